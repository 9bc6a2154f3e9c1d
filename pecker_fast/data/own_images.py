"""The user's own images for methods that learn from images (`images: PATH`): by class, or with captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from pecker_fast.data.class_folders import folder_of, image_files, is_litter
from pecker_fast.data.datasets import Dataset, open_data
from pecker_fast.errors import DataError

TABLES = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption")  # of one image, as trainers of LoRA files have them
CAPTION_BYTES = 1 << 26  # of a table


def class_images(
    path: str | Path, size: int, classes: Sequence[int], own: int | None, names: Sequence[str] | None = None
) -> Dataset:
    """Images of those of the classes that have a subfolder, by number or by name; where none has, the images of the folder itself,
    of the class `own`. size: pixels of a side. Raises DataError."""
    folder = _folder(path)
    found = [label for label in classes if folder_of(folder, label, names) is not None]
    if not found and own is None:
        wanted = ", ".join(map(str, classes))
        raise DataError(f"{folder}: no subfolder for any of the classes {wanted}; name one by its number or its name")
    return open_data("images", folder, size=size, classes=found or [own or 0], names=names)


def captioned_images(path: str | Path, size: int) -> tuple[Dataset, list[str] | None]:
    """Images of a folder and the caption of each, from metadata.jsonl or .csv (file_name, text) or a text file beside each; None
    where there are no captions at all. Raises DataError, also where some images have one and others not."""
    folder = _folder(path)
    data, images = open_data("images", folder, size=size, classes=[0]), image_files(folder)
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    captions = _beside(images) if table is None else _in_table(table)
    if not captions:
        return data, None
    for image in images:
        if image.name not in captions:
            raise DataError(
                f"{image}: has no caption{f' in {table.name}' if table else ' beside it'}, others have; give it one"
            )
    return data, [captions[image.name] for image in images]


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; images is pool, trajectory or a folder")
    return folder


def _beside(images: Sequence[Path]) -> dict[str, str]:
    found = {}
    for image in images:
        beside = next((image.with_suffix(end) for end in BESIDE if image.with_suffix(end).is_file()), None)
        if beside is not None:
            found[image.name] = _text(beside).strip()
    return found


def _in_table(path: Path) -> dict[str, str]:
    """File name -> caption of every row. Raises DataError naming the line."""
    text = _text(path)
    if path.suffix == ".csv":
        rows = list(enumerate(csv.DictReader(text.splitlines()), start=2))
    else:
        rows = [(n, _row(path, n, line)) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    found = {}
    for n, row in rows:
        name, caption = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise DataError(f"{path}, line {n}: a file_name and a text are needed")
        if Path(name).name != name or is_litter(name) or not (path.parent / name).is_file():
            raise DataError(f"{path}, line {n}: {name!r} is no image beside it")
        found[name] = caption.strip()
    return found


def _row(path: Path, n: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {n}: not a JSON object")
    return row


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > CAPTION_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes of captions, at most {CAPTION_BYTES} expected")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
