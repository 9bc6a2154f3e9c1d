"""Folders as a whole: copied, deleted, put in each other's place. Under its name a folder is whole or absent at every step.

While something is under way, beside NAME lie `.NAME.tmp-XXXXXXXX` (being written), `.NAME.old-XXXXXXXX` (set aside, whole,
until the new one stands in its place) or `.NAME.gone-XXXXXXXX` (being deleted). What a killed process has left of these the
next one clears away: see `sweep`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pecker_fast.errors import OutputError
from pecker_fast.files import writing
from pecker_fast.files.links import Tree, opened_inside
from pecker_fast.files.reading import reason_of
from pecker_fast.terminal import warn

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old|gone)-[0-9a-f]{8}")
_CHUNK_BYTES = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def beside(path: Path, kind: str) -> Path:
    """A free name beside `path` for what is under way: "tmp", "old" or "gone"."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


def remove_tree(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, read-only or not; a folder is gone from its name at once.

    Raises OSError that names what is left.
    """
    if not os.path.lexists(path):
        return
    left = path
    if path.is_dir() and not path.is_symlink() and not _LEFT.fullmatch(path.name):
        left = beside(path, "gone")
        writing.disk_step(f"rename:{path.name}")
        os.rename(path, left)
    try:
        _delete(left)
    except OSError as reason:
        raise OSError(reason.errno, reason_of(reason), str(left)) from None


def discard(path: Path) -> None:
    """Delete what nobody needs any more; where that fails a warning names what is left, and nothing else happens."""
    try:
        remove_tree(path)
    except OSError as reason:
        warn(
            f"{reason.filename or path}: could not be deleted ({reason_of(reason)}); nothing needs it, delete it yourself"
        )


def abandon(path: Path) -> None:
    """Delete what a failed step has left of its own, which is no step itself; a warning names what stays."""
    try:
        _delete(path, step=lambda name: None)
    except OSError as reason:
        warn(f"{path}: could not be deleted ({reason_of(reason)}); nothing needs it, delete it yourself")


def _delete(path: Path, step: Callable[[str], None] = lambda name: writing.disk_step(name)) -> None:
    if path.is_symlink() or not path.is_dir():
        step(f"unlink:{path.name}")
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):  # a copy of a read-only folder; if it cannot be helped, deleting says so
        path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IRWXU)
    for entry in sorted(path.iterdir()):
        _delete(entry, step)
    step(f"rmdir:{path.name}")
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def replace_folder(source: Path, target: Path) -> None:
    """Put folder `source` in the place of `target`: one of the two stands there, whole, at every step, if need be set aside.

    Raises OSError, with the old one in its place. The old one is deleted at the end.
    """
    if not os.path.lexists(target):
        writing.replace(source, target)
        return
    writing.disk_step(f"replace:{target.name}")
    if _exchanged(source, target):
        old = source
        writing.fsync_folder(target.parent)
    else:
        old = beside(target, "old")
        os.rename(target, old)
        try:
            writing.replace(source, target)
        except BaseException:
            if not target.exists():
                os.rename(old, target)
            raise
    discard(old)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether two folders have changed places in one step, as Linux can on most file systems."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and not call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of `target` at the end of the block, or is gone if that fails.

    Raises OutputError, with what was at `target` before intact.
    """
    target = Path(target)
    with _under_way(target, "mkdir") as temporary:
        yield temporary
        replace_folder(temporary, target)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path of the same name for another's writer, whose file takes the place of `path` at the end of the block.

    Raises OutputError, with what was at `path` before intact.
    """
    path = Path(path)
    with _under_way(path, "write") as temporary:
        yield temporary / path.name
        writing.fsync_file(temporary / path.name)
        writing.replace(temporary / path.name, path)
        abandon(temporary)


@contextlib.contextmanager
def _under_way(target: Path, step: str) -> Iterator[Path]:
    """A temporary folder beside `target` that no other process sweeps away, and that is gone if the block fails."""
    with writing.output_errors(target):
        sweep(target.parent, {target.name})
        temporary = beside(target, "tmp")
        try:
            writing.disk_step(f"{step}:{target.name}")
            temporary.mkdir(parents=True)
            with _in_use(temporary):
                yield temporary
        except BaseException:
            abandon(temporary)
            raise


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Inside, no other process sweeps the folder away."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with writing.in_use(fd):
            yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder, and hold it for this process; raises OutputError when another process does. Leaves no file in it."""
    with writing.output_errors(folder):
        writing.make_folder(folder)
        fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            lock(fd, f"{folder}: another process is at work in it")
        yield
    finally:
        os.close(fd)


def lock(fd: int, busy: str) -> None:
    """Lock an open file or folder for this process; raises OutputError, which begins with `busy`, where another holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{busy}; wait for it, or give another output") from None


def sweep(folder: Path, names: Collection[str] | None = None) -> None:
    """Clear away what a killed process has left in `folder` beside these names (None: beside any).

    A folder that was set aside goes back to its place where that is empty. Nothing but names of our own pattern is touched;
    what cannot be deleted is named in a warning.
    """
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        found = _LEFT.fullmatch(entry.name)
        if found is None or (names is not None and found["name"] not in names) or writing.is_used(entry):
            continue
        target = folder / found["name"]
        if found["kind"] == "old" and not os.path.lexists(target):
            writing.disk_step(f"rename:{entry.name}")
            os.rename(entry, target)
        else:
            discard(entry)


def is_left_over(path: Path) -> bool:
    """Whether a name is one of those that a killed process leaves, see `sweep`."""
    return _LEFT.fullmatch(path.name) is not None


def copy_file(source: Path, target: Path, tree: Tree) -> None:
    """Copy the bytes of a file of a model folder, making parent folders, and make them durable. tree: the model's, see `tree_of`.

    Raises ModelError and OSError.
    """
    with opened_inside(source, tree) as file:
        writing.make_folder(target.parent)
        writing.disk_step(f"write:{target.name}")
        with target.open("xb") as copy:
            shutil.copyfileobj(file, copy, _CHUNK_BYTES)
    writing.fsync_file(target)
