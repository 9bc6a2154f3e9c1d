"""Atomic writing: a temporary file in the same folder, fsync, one `os.replace`, fsync of the folder.

Every such step calls `fault_point` first, a hook that does nothing here and that tests replace to fail or to die at a
chosen step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pecker_fast.errors import OutputError
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


def _fsync_fd(fd: int, name: str) -> None:
    disk_step(f"fsync:{name}")
    os.fsync(fd)


def fsync_folder(path: str | Path) -> None:
    """Make the entries of a folder durable; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync_fd(fd, Path(path).name)
    finally:
        os.close(fd)


def replace(source: str | Path, target: str | Path) -> None:
    """`os.replace` of a file or folder, then fsync of the folder that holds `target`; raises OSError."""
    disk_step(f"replace:{Path(target).name}")
    os.replace(source, target)
    fsync_folder(Path(target).parent)


def remove(path: str | Path) -> None:
    """Delete one file; raises OSError."""
    disk_step(f"unlink:{Path(path).name}")
    os.unlink(path)


@contextlib.contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError naming `path` and the remedy."""
    try:
        yield
    except OSError as reason:
        full = reason.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space and try again" if full else "; choose another output folder"
        raise OutputError(f"{path}: cannot write: {reason_of(reason)}{hint}") from None


def _write_atomic(path: str | Path, fill: Callable[[BinaryIO], None]) -> None:
    path = Path(path)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                disk_step(f"write:{path.name}")
                fill(file)
                file.flush()
                _fsync_fd(file.fileno(), path.name)
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
