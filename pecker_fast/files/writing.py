"""Atomic writing: a temporary file in the same folder, fsync, one `os.replace`, fsync of the folder.

Every such step calls `fault_point` first, a hook that does nothing here and that tests replace to fail or to die at a
chosen step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pecker_fast.errors import OutputError, PeckerError
from pecker_fast.files.hashes import tensor_bytes
from pecker_fast.files.reading import reason_of

if TYPE_CHECKING:
    from torch import Tensor


def fault_point(name: str) -> None:
    """Called as `write:FILE`, `fsync:FILE`, `replace:FILE`, `unlink:FILE`, and for folders `mkdir:`, `rename:` and `rmdir:NAME`,
    before each such step; does nothing."""


def disk_step(name: str) -> None:
    """What every such step begins with."""
    fault_point(name)


def fsync_fd(fd: int, name: str) -> None:
    """Make an open file or folder durable; raises OSError."""
    disk_step(f"fsync:{name}")
    os.fsync(fd)


def fsync_folder(path: str | Path) -> None:
    """Make the entries of a folder durable; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync_fd(fd, Path(path).name)
    finally:
        os.close(fd)


def make_folder(path: str | Path) -> None:
    """Make a folder, and those above it, where it is not there; raises OSError."""
    path = Path(path)
    if not path.is_dir():
        disk_step(f"mkdir:{path.name}")
        path.mkdir(parents=True, exist_ok=True)


def fsync_file(path: str | Path) -> None:
    """Make what another's writer has written durable; raises OSError."""
    with Path(path).open("rb+") as file:
        fsync_fd(file.fileno(), Path(path).name)


def replace(source: str | Path, target: str | Path) -> None:
    """`os.replace` of a file or folder, then fsync of the folder that holds `target`; raises OSError."""
    disk_step(f"replace:{Path(target).name}")
    os.replace(source, target)
    fsync_folder(Path(target).parent)


def remove(path: str | Path) -> None:
    """Delete one file; raises OSError."""
    disk_step(f"unlink:{Path(path).name}")
    os.unlink(path)


def disk_error(error: BaseException) -> OSError | None:
    """The error of the disk that this one is, or tells of: libraries in Rust end theirs with "(os error 28)"."""
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


def is_full(error: OSError) -> bool:
    """Whether there is no space left on the disk, or none for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an error of the disk inside the block into an OutputError naming `path` and the remedy."""
    try:
        yield
    except PeckerError:
        raise
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        hint = "; free some space and try again" if is_full(reason) else "; choose another output folder"
        raise OutputError(f"{path}: cannot write: {reason_of(reason)}{hint}") from None


@contextlib.contextmanager
def in_use(fd: int) -> Iterator[None]:
    """Inside, no other process takes the open file or folder for a left-over."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield


def is_used(path: Path) -> bool:
    """Whether another process holds what it has under way here, see `in_use`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _clear_left(path: Path) -> None:
    """Delete what killed processes have left of this very file."""
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.tmp-{'[0-9a-f]' * 8}")):
        if left.is_file() and not is_used(left):
            remove(left)


def _write_atomic(path: str | Path, fill: Callable[[BinaryIO], None]) -> None:
    path = Path(path)
    with output_errors(path):
        make_folder(path.parent)
        _clear_left(path)
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file, in_use(file.fileno()):
                disk_step(f"write:{path.name}")
                fill(file)
                file.flush()
                fsync_fd(file.fileno(), path.name)
                replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                if temporary.exists():
                    remove(temporary)
            raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically, making parent folders; raises OutputError and leaves nothing behind."""

    def fill(file: BinaryIO) -> None:
        file.write(data)

    _write_atomic(path, fill)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, making parent folders; raises OutputError and leaves nothing behind."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, obj: Any) -> None:
    """Write a value as indented JSON, atomically; raises OutputError."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, making parent folders; raises OutputError and leaves nothing behind.

    Equal input gives equal bytes: safetensors' own writer orders the metadata by chance and leaves no place for fsync,
    so the file (8 bytes of header length, JSON header, raw bytes) is laid out here. Tensors are written one at a time.
    """
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in order:
        tensor, end = tensors[key], offset + tensors[key].numel() * tensors[key].element_size()
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(tensor_bytes(tensors[key]))

    _write_atomic(path, fill)
