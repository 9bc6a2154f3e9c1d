"""Which folder or file the name of a model means: a shipped model, a local path, a model of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pecker_fast.errors import ModelError
from pecker_fast.files import hub
from pecker_fast.files.folders import check_parts
from pecker_fast.files.guard import guarded
from pecker_fast.files.index import PARTS
from pecker_fast.files.reading import reason_of

ASSETS = Path(__file__).parents[1] / "assets"


def at_home(name: str) -> str:
    """A path with the home folder in the place of `~` or `~user` at its start; raises ValueError where there is none."""
    if not name.startswith("~"):
        return name
    path = os.path.expanduser(name)
    if path == name:
        raise ValueError(
            f"there is no home folder {name.partition('/')[0][:80]!r}; write the folder's name out (or ./~…)"
        )
    return path


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.name for path in ASSETS.iterdir() if path.is_dir()) if ASSETS.is_dir() else []


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Folder or single file of a model: a shipped name, else a local path, else (owner/name) fetched from the Hugging Face hub.

    revision: commit, branch or tag of a hub model. Only configs, tokenizers and safetensors of a diffusers folder are ever
    fetched. This is the one way in to a foreign model: links, code and what is no file are looked for before anything of it
    is read. Raises ModelError for those, and when there is nothing of that name.
    """
    if name in shipped_models():
        return ASSETS / name
    path = _local_or_fetched(name, revision)
    with guarded(path, "cannot be looked through"):
        if path.is_dir():
            check_parts(path, PARTS)
    return path


def _local_or_fetched(name: str, revision: str | None) -> Path:
    path = Path(name or "(empty name)")
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as reason:
        raise ModelError(f"{name[:80]}: not a folder name: {reason_of(reason)}") from None
    if is_hub_name(name):
        return _from_hub(name, revision)
    shipped = ", ".join(shipped_models()) or "none"
    if path.suffix == "" and len(path.parts) > 1:
        shipped += "; `pecker-fast pretrain` makes others"
    raise ModelError(f"{name}: no such model folder; shipped models: {shipped}")


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one of the hub (owner/name), and no local path or shipped name."""
    path = Path(name)
    local = name in shipped_models() or path.exists() or _local_owner(path)
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and ".." not in name and not local


def _local_owner(path: Path) -> bool:
    return path.parts[0] == "runs" or Path(path.parts[0]).is_dir()


def revision_of(folder: Path) -> str | None:
    """Commit of a model folder in the hub's cache (snapshots/COMMIT); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _from_hub(name: str, revision: str | None) -> Path:
    return hub.fetch(name, revision)
