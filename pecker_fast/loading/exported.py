"""An exported folder under its own manifest: whether what is loaded from it is what was written.

manifest.json lists every file but the card, which is its owner's to edit. Folders of earlier versions have none: of them the
UNet is compared with the `weights_sha256` of model.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import ModelError, PeckerError
from pecker_fast.networks import load_unet
from pecker_fast.terminal import warn

FORMAT, VERSION = "pecker-fast pipeline", 1
ABOUT = "model.json"
UNLISTED = ("README.md", "samples", files.MANIFEST)


def seal_exported(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that is whole but for it. about: whose it is, hashes by name. Raises OutputError."""
    head = {"format": FORMAT, "version": VERSION, **about}
    files.write_sealed(folder / files.MANIFEST, {**head, "files": files.entries_of(folder, UNLISTED)})


def exported_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none. Raises ModelError where it is damaged."""
    path = folder / files.MANIFEST
    if not path.is_file():
        return None
    found = files.read_sealed(path, error=ModelError, sealed=True)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise ModelError(f"{path}: no manifest of a {FORMAT} of version {VERSION}")
    return found


def check_exported(folder: Path, remedy: str, part: str = "") -> None:
    """Raises ModelError, naming the file, where what is there is not what was written. part: look at that alone."""
    manifest = exported_manifest(folder)
    if manifest is None:
        _check_weights(folder, remedy)
        return
    entries = manifest.get("files")
    if part and isinstance(entries, dict):
        entries = {name: entry for name, entry in entries.items() if name.startswith(f"{part}/")}
    files.check_entries(folder, entries, "exported folder", remedy, ModelError)


def is_sound(folder: Path) -> bool:
    """Whether it is what was exported; where it is not, a warning says why."""
    if not folder.is_dir():
        return False
    try:
        check_exported(folder, "it is written again")
    except PeckerError as error:
        warn(str(error))
        return False
    return True


def _check_weights(folder: Path, remedy: str) -> None:
    card, unet = folder / ABOUT, folder / "unet"
    about = files.read_object(card) if card.is_file() else {}
    said = about.get("weights_sha256")
    if said is None or files.hash_of(files.read_weights(unet)) == said:
        return
    if files.sha256_tensors(load_unet(unet).named_parameters()) != said:  # as those of class models were hashed once
        raise ModelError(f"{unet}: not the weights that {ABOUT} beside it names (sha256 {str(said)[:12]}…); {remedy}")
