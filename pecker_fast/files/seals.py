"""Files that carry their own checksum, and folders with a manifest: what was altered after it was written is told as that.

A sealed file is a JSON object whose last key, `sha256`, is taken over all others; a manifest is a sealed file with sha256 and
size of every file beside it. A checksum finds damage and edits; whoever writes a new one as well is not found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pecker_fast.errors import DataError, PeckerError
from pecker_fast.files.hashes import sha256_file
from pecker_fast.files.reading import read_json
from pecker_fast.files.trees import is_left_over
from pecker_fast.files.writing import write_json

SEAL = "sha256"
MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_value(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever its layout and the order of its keys."""
    plain = json.loads(json.dumps(value))  # as it comes back from a file: keys are texts, tuples are lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_sealed(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON with its checksum, atomically; raises OutputError."""
    write_json(path, {**content, SEAL: sha256_value(content)})


def read_sealed(
    path: str | Path, *, error: type[PeckerError] = DataError, sealed: bool = False, remedy: str = ""
) -> dict[str, Any]:
    """The object of a sealed file without its checksum; raises `error` where the two do not belong together.

    sealed: whether a checksum must be there; files of earlier versions have none. remedy: what to do about a damaged one.
    """
    end = f"; {remedy}" if remedy else ""
    content = read_json(path, error=error)
    if not isinstance(content, dict):
        raise error(f"{path}: damaged: a JSON object was expected{end}")
    if SEAL not in content and not sealed:
        return content
    said = content.pop(SEAL, None)
    if said != sha256_value(content):
        raise error(f"{path}: damaged or edited: what it holds is not what its own sha256 was taken over{end}")
    return content


def entries_of(folder: Path, left_out: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Path in `folder` → sha256 and size, of all files in it; left_out: names at its top."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not is_left_over(path))
    inside = [(path.relative_to(folder), path) for path in found]
    return {
        name.as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for name, path in inside
        if name.parts[0] not in left_out
    }


def check_entries(folder: Path, entries: Any, what: str, remedy: str, error: type[PeckerError]) -> None:
    """Raise `error`, naming the file, where one of a manifest's is missing or altered.

    what: the thing that the folder is; remedy: what to do about it.
    """
    if not isinstance(entries, dict) or not entries:
        raise error(f"{folder / MANIFEST}: lists no files; {remedy}")
    for name, entry in entries.items():
        if not _is_entry(name, entry):
            raise error(f"{folder / MANIFEST}: damaged: no sha256 and size for {str(name)[:80]}; {remedy}")
        path = folder / name
        if not path.is_file():
            raise error(f"{path}: missing from the {what}; {remedy}")
        if path.stat().st_size != entry["bytes"] or sha256_file(path, error=error) != entry["sha256"]:
            raise error(f"{path}: damaged (its sha256 is not the manifest's); {remedy}")


def _is_entry(name: str, entry: Any) -> bool:
    parts = Path(name).parts
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
        and type(entry.get("bytes")) is int
        and bool(parts)
        and not Path(name).is_absolute()
        and ".." not in parts
        and "\0" not in name
    )
