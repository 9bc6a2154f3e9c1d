"""The manifest of a checkpoint: what it holds, whose it is, how far it came, on what machine; under a checksum of its own.

Version 1, of releases before, has no checksum and says nothing of the machine; all else of it is checked alike.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import CheckpointError
from pecker_fast.machine import hardware

FORMAT, VERSION = "pecker-fast checkpoint", 2
NAME = re.compile(r"step-(\d{6,})")
STATE = "state.json"
STAGES = ("distill", "forget")
IDENTITY = {  # of a manifest: what a checkpoint may not be loaded without
    "recipe_sha256": "another recipe",
    "base_sha256": "another base model",
    "start_sha256": "another start (model, generator or prompts)",
}
_OLDER = "use an older one"
_KEYS_OF_1 = {"format", "version", "step", "files", *IDENTITY}


class ForeignCheckpointError(CheckpointError):
    """A whole checkpoint of another run."""


def write_manifest(folder: Path, step: int, identity: dict[str, str]) -> None:
    """Over all files in `folder`. Raises OutputError, OSError."""
    head = {"format": FORMAT, "version": VERSION, "step": step, **identity, "machine": hardware.numerics()}
    files.write_sealed(folder / files.MANIFEST, {**head, "files": files.entries_of(folder)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest itself, undamaged; the files it lists are not looked at. Raises CheckpointError."""
    path = folder / files.MANIFEST
    content = files.read_json(path, error=CheckpointError)
    known = content if isinstance(content, dict) else {}
    earlier = known.get("version") == 1 and known.keys() <= _KEYS_OF_1
    if not earlier:
        content = files.read_sealed(
            path, error=CheckpointError, sealed=known.get("version") in (1, VERSION), remedy=_OLDER
        )
    if content.get("format") != FORMAT or type(content.get("step")) is not int:
        raise CheckpointError(f"{path}: not a checkpoint manifest; {_OLDER}")
    if not earlier and content.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint version {files.shown(content.get('version'))}, this release reads 1 and {VERSION}"
        )
    return content


def verify_checkpoint(folder: Path, distill_steps: int | None = None) -> dict[str, Any]:
    """The manifest of a whole checkpoint. distill_steps: of its recipe, where that is known.

    Raises CheckpointError naming the file that is missing, altered or not the manifest's, and where folder name, manifest and
    state.json have it at different steps.
    """
    manifest = read_manifest(folder)
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise CheckpointError(
            f"{folder / files.MANIFEST}: wrong step: it is of step {manifest['step']}, not of {folder.name}; {_OLDER}"
        )
    files.check_entries(folder, manifest.get("files"), "checkpoint", _OLDER, CheckpointError)
    listed = {*manifest["files"], files.MANIFEST}
    if STATE not in listed:
        raise CheckpointError(f"{folder / STATE}: missing from the checkpoint; {_OLDER}")
    for path in sorted(folder.iterdir()):
        if path.name not in listed and path.suffix in (".json", ".safetensors") and not path.name.startswith("."):
            raise CheckpointError(f"{path}: not of this checkpoint (its manifest does not list it); {_OLDER}")
    _check_step(folder, manifest["step"], distill_steps)
    return manifest


def _check_step(folder: Path, step: int, distill_steps: int | None) -> None:
    counters = counters_of(folder)
    before = step - counters["step"]  # iterations of the stage before
    if counters["stage"] == "distill":
        right = before == 0
    else:
        right = before >= 0 if distill_steps is None else before == distill_steps
    if not right:
        raise CheckpointError(
            f"{folder / STATE}: wrong step: {counters['stage']} step {counters['step']}, the manifest is of step {step}; {_OLDER}"
        )


def counters_of(folder: Path) -> dict[str, Any]:
    """`counters` of state.json: stage, step and what has been spent. Raises CheckpointError."""
    state = files.read_json(folder / STATE, error=CheckpointError)
    counters = state.get("counters") if isinstance(state, dict) else None
    known = counters if isinstance(counters, dict) else {}
    if known.get("stage") not in STAGES or type(known.get("step")) is not int:
        raise CheckpointError(f"{folder / STATE}: damaged: it does not say which step it is of; {_OLDER}")
    return known


def check_belongs(folder: Path, manifest: dict[str, Any], identity: dict[str, str]) -> None:
    """Raises ForeignCheckpointError where the checkpoint is of another recipe, base model or start than these."""
    for key, value in _as_written(identity, manifest).items():
        if manifest.get(key) != value:
            raise ForeignCheckpointError(
                f"{folder}: belongs to {IDENTITY[key]}; resume=never starts over, or give another output"
            )


def _as_written(identity: dict[str, str], manifest: dict[str, Any]) -> dict[str, str]:
    """The identity by the names of the manifest: an earlier version called `base_sha256` what is `start_sha256` now."""
    known = {key: value for key, value in identity.items() if key in IDENTITY}
    if "start_sha256" in manifest or "start_sha256" not in known:
        return known
    return {"recipe_sha256": known["recipe_sha256"], "base_sha256": known["start_sha256"]}


def other_machine(folder: Path) -> list[str]:
    """A line where a checkpoint was made on another device, or with other instructions or threads, than this process has; no line
    where it was not, or where an earlier version did not say."""
    then, now = read_manifest(folder).get("machine"), hardware.numerics()
    if not isinstance(then, dict):
        return []
    changed = [f"{key} {then.get(key)} then, {now.get(key)} now" for key in now if then.get(key) != now[key]]
    if not changed:
        return []
    return [
        f"goes on from {folder.name} in other circumstances ({'; '.join(changed)}): bits will differ from an unbroken run's"
    ]
