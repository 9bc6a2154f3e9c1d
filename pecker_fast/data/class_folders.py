"""Folders of images by class: which folder is which class number, and which entries are no data at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pecker_fast.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"}
OTHER_IMAGES = {".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".raw", ".dng", ".cr2", ".nef"}
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


def is_litter(name: str) -> bool:
    """Whether an entry of a folder was put there by an operating system or a program: hidden, ._*, __MACOSX, Thumbs.db, …"""
    return name.startswith(".") or name.casefold() in _LITTER


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Key that sorts names as people do: numbers by their value, so that 10 comes after 2."""
    parts = re.split(r"([0-9]+)", name)
    return (*((0, int(p), p) if p.isdigit() and p.isascii() else (1, 0, p) for p in parts if p), (1, 0, name))


def class_names(path: Path) -> list[str]:
    """Names of the class folders in `path`; a class's number is its place. Raises DataError with less than two."""
    names = sorted(
        (entry.name for entry in path.iterdir() if entry.is_dir() and not is_litter(entry.name)), key=natural
    )
    if len(names) < 2:
        raise DataError(f"{path}: {len(names)} class subfolders, at least 2 expected")
    return names


def class_folders(path: Path, classes: Sequence[int], names: Sequence[str] | None) -> list[tuple[Path, int]]:
    """(folder, class) of some classes in `path`; of a single class also `path` itself, where it has no such folder.

    names: class folders of the data that the model was made from, by number; None = folders are named by number. Where no
    name is a number, numbers serve as well. Raises DataError.
    """
    found = [(folder_of(path, label, names), label) for label in classes]
    if len(classes) == 1 and found[0][0] is None:
        return [(path, classes[0])]
    for folder, label in found:
        if folder is None:
            called = f" ({names[label]})" if names and label < len(names) else ""
            wanted = ", ".join(map(str, classes))
            raise DataError(
                f"{path / str(label)}{called}: missing; expected a subfolder for each of the classes {wanted}"
            )
    return [(folder, label) for folder, label in found if folder is not None]


def folder_of(path: Path, label: int, names: Sequence[str] | None) -> Path | None:
    """The subfolder of a class, by its name or its number; None where there is none."""
    wanted = [names[label]] if names and label < len(names) else []
    if not names or not any(name.isdecimal() for name in names):
        wanted.append(str(label))
        same = (entry.name for entry in path.iterdir() if entry.name.isdecimal() and int(entry.name) == label)
        wanted += sorted(same)  # 02
    return next((path / name for name in wanted if (path / name).is_dir()), None)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder by name; raises DataError without any, and for one of a kind that is not read."""
    entries = [file for file in folder.iterdir() if not is_litter(file.name) and file.is_file()]
    if other := min((file for file in entries if file.suffix.lower() in OTHER_IMAGES), default=None):
        raise DataError(f"{other}: {other.suffix} images are not read; convert it to PNG, or take it out")
    inside = [file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES]
    if not inside:
        raise DataError(f"{folder}: class without a PNG or JPEG image")
    return sorted(inside, key=lambda file: file.name)
