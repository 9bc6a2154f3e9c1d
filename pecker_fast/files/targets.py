"""What may be overwritten: results of ours, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pecker_fast.errors import OutputError, PeckerError
from pecker_fast.files.reading import read_json, reason_of

_PNG = b"\x89PNG\r\n\x1a\n"


def check_picture(path: str | Path) -> Path:
    """The path, if a PNG may be written there: it ends in .png, and nothing or an older PNG is there. Raises OutputError."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a picture, such as {path / 'grid.png'}")
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path}: pictures are PNG; give a name that ends in .png")
    if not os.path.lexists(path):
        return path
    try:
        with path.open("rb") as file:
            is_picture = file.read(len(_PNG)) == _PNG
    except OSError as reason:
        raise OutputError(f"{path}: exists and cannot be read ({reason_of(reason)}); give another name") from None
    if not is_picture:
        raise OutputError(f"{path}: exists and is no PNG picture, so it is not overwritten; give another name")
    return path


def check_json(path: str | Path, keys: Iterable[str]) -> Path:
    """The path, if a JSON file may be written there: nothing is there, or an older one with these keys. Raises OutputError."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a JSON file, such as {path / 'figures.json'}")
    if not os.path.lexists(path):
        return path
    try:
        found = read_json(path)
    except PeckerError:
        found = None
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise OutputError(
            f"{path}: exists and is no result of this command, so it is not overwritten; give another name"
        )
    return path
