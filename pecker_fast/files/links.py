"""Entries of a model folder: that they stay inside it, and that nothing but files, folders and links to them lies there."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pecker_fast.errors import ModelError
from pecker_fast.files.reading import MAX_TEXT_BYTES, reason_of

_WITHOUT_WAITING = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
_SHARED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")  # a file in the hub's store for all models


class Tree(NamedTuple):
    """A model's own files. `blobs`: where the snapshot of a hub model links to; `store`: where those may link to in turn."""

    home: Path
    blobs: Path | None = None
    store: Path | None = None

    def holds(self, target: Path) -> bool:
        """Whether a resolved path is one of them."""
        if target.is_relative_to(self.home) or (self.blobs is not None and target.is_relative_to(self.blobs)):
            return True
        if self.store is None or not target.is_relative_to(self.store):
            return False
        return _SHARED.fullmatch(target.relative_to(self.store).as_posix()) is not None


def tree_of(folder: Path) -> Tree:
    """What belongs to a model folder: all in it; in the hub's cache, CACHE/models--NAME/snapshots/REVISION, its blobs too.
    Raises ModelError."""
    try:
        home = folder.resolve()
    except (OSError, RuntimeError) as reason:
        raise ModelError(f"{folder}: leads nowhere ({reason_of(reason)})") from None
    for snapshot in (home, *home.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith("models--"):
            return Tree(home, model / "blobs", model.parent / "blobs")
    return Tree(home)


def check_entry(entry: Path, tree: Tree) -> None:
    """Raises ModelError for a link out of `tree`, in a circle or to nothing, and for pipes and devices, which would be
    waited for."""
    try:
        target = entry.resolve()
        if not tree.holds(target):
            raise ModelError(f"{entry}: a link that leaves the model folder; copy the file in its place")
        mode = target.stat().st_mode
    except (OSError, ValueError, RuntimeError) as reason:  # RuntimeError: a circle, before Python 3.13
        why = "a link to itself" if isinstance(reason, RuntimeError) else reason_of(reason)
        raise ModelError(f"{entry}: leads nowhere ({why}); put the file in its place, or remove it") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(f"{entry}: neither a file nor a folder; nothing else is read in a model folder")


@contextlib.contextmanager
def opened_inside(path: Path, tree: Tree) -> Iterator[BinaryIO]:
    """A file of a model folder, opened once: what is read is what was found to lie in `tree`, whatever its name leads to by
    then. Raises ModelError as `check_entry`, and for anything but a file."""
    check_entry(path, tree)
    try:
        file = open(os.open(path, _WITHOUT_WAITING), "rb")  # noqa: SIM115 - closed below
    except OSError as reason:
        raise ModelError(f"{path}: cannot be read: {reason_of(reason)}") from None
    with file:
        if not _lies_in(tree, path, file.fileno()):
            raise ModelError(f"{path}: was changed while it was read; do that with a copy of the folder")
        yield file


def read_inside(path: Path, tree: Tree) -> bytes:
    """A text file of a model folder, as `opened_inside`; raises ModelError, also for one that is too long."""
    with opened_inside(path, tree) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ModelError(f"{path}: is too long for a text file here (at most {MAX_TEXT_BYTES} bytes)")
    return data


def _lies_in(tree: Tree, path: Path, descriptor: int) -> bool:
    """Whether the open file is the regular one that `path` leads to, inside `tree`."""
    try:
        target = path.resolve()
        found, opened = target.lstat(), os.fstat(descriptor)
    except (OSError, RuntimeError):
        return False
    return tree.holds(target) and stat.S_ISREG(opened.st_mode) and os.path.samestat(found, opened)
