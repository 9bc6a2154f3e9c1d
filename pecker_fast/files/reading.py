"""Reading foreign files: safetensors, JSON and UTF-8 text; never a pickle, never code."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecker_fast.errors import DataError, OutOfMemory, PeckerError, lack_of_memory

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
MAX_TEXT_BYTES = 8 << 20
MAX_HEADER_BYTES = 8 << 20
_LARGE_BYTES = 1 << 30
MOST_TENSORS = 20_000  # eight times those of the largest checkpoint there is a use for
_POINTER = b"version https://git-lfs"
_NO_FILE = "a git-lfs pointer, not the file itself; run `git lfs pull` in the folder that was cloned"
NO_PICKLE = "pickle weights are never opened; convert them to safetensors"


def size_of(path: Path, what: str, error: type[PeckerError]) -> int:
    """Size of a regular file in bytes; anything else (folder, pipe, device, nothing) raises `error`."""
    try:
        info = path.stat()
    except (OSError, ValueError) as reason:
        raise error(f"{path}: cannot open the {what}: {reason_of(reason)}") from None
    if not stat.S_ISREG(info.st_mode):
        raise error(f"{path}: not a regular file; a {what} was expected")
    return info.st_size


def reason_of(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def first_line(reason: BaseException) -> str:
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]


def read_text(path: str | Path, *, limit: int = MAX_TEXT_BYTES, error: type[PeckerError] = DataError) -> str:
    """The UTF-8 text of a file of at most `limit` bytes; raises `error` for everything else."""
    path = Path(path)
    size = size_of(path, "text file", error)
    if size > limit:
        raise error(f"{path}: {size} bytes is too long for a text file here (at most {limit})")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason_of(reason)}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not UTF-8 text (byte {reason.start}); was a binary file given?") from None
    if "\0" in text:
        raise error(f"{path}: not text (it holds zero bytes); was a binary file given?")
    return text


def read_json(path: str | Path, *, error: type[PeckerError] = DataError) -> Any:
    """The value in a JSON file; raises `error`, with line and column, when it is damaged."""
    text = read_text(path, error=error)
    if text.startswith(_POINTER.decode()):
        raise error(f"{path}: {_NO_FILE}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as reason:
        raise error(f"{path}: damaged JSON, line {reason.lineno} column {reason.colno}: {reason.msg}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: damaged JSON: {type(reason).__name__}") from None


def check_no_pointer(path: str | Path, *, error: type[PeckerError] = DataError) -> None:
    """Raises `error` where a file that was to be fetched by git-lfs is still the few lines that stand for it."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(len(_POINTER))
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason_of(reason)}") from None
    if head == _POINTER:
        raise error(f"{path}: {_NO_FILE}")


def check_tensors(path: str | Path, *, error: type[PeckerError] = DataError) -> None:
    """Look at the first bytes of a tensor file; raises `error` unless it can be a safetensors file.

    A pickle is refused under any name, and a header larger than `MAX_HEADER_BYTES` or than the file is never parsed.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(f"{path}: {NO_PICKLE}")
    size = size_of(path, "safetensors file", error)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason_of(reason)}") from None
    header = int.from_bytes(head[:8], "little")
    if len(head) == 9 and head[8:] == b"{" and header <= min(size - 8, MAX_HEADER_BYTES):
        return
    check_no_pointer(path, error=error)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise error(f"{path}: holds a pickle, whatever its name; {NO_PICKLE}")
    if len(head) == 9 and head[8:] == b"{" and MAX_HEADER_BYTES < header <= size - 8:
        raise error(f"{path}: safetensors header of {header} bytes is too long (at most {MAX_HEADER_BYTES})")
    raise error(f"{path}: not a safetensors file, or cut short ({size} bytes); fetch or write it again")


@contextlib.contextmanager
def _opened(path: str | Path, error: type[PeckerError]) -> Iterator[Any]:
    """A safetensors file, checked and opened; inside, whatever is wrong with it raises `error`."""
    check_tensors(path, error=error)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            if (count := len(file.keys())) > MOST_TENSORS:
                raise error(f"{path}: holds {count:,} tensors; at most {MOST_TENSORS:,} are expected in a file")
            yield file
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
    ) as reason:
        if lack_of_memory(reason) is not None:
            raise _too_large(path) from None
        text = f"{path}: damaged safetensors file: {first_line(reason)}; fetch or write it again"
        raise error(text) from None
    except MemoryError:
        raise _too_large(path) from None


def _too_large(path: str | Path) -> OutOfMemory:
    return OutOfMemory(f"{path}: out of memory while it was read; free some, or take a machine with more")


def _check_memory(path: Path, error: type[PeckerError]) -> None:
    """Raises `error` for a file of gigabytes that is larger than the memory that is free."""
    size = size_of(path, "safetensors file", error)
    if size > _LARGE_BYTES and (free := _free_bytes()) is not None and size > free:
        raise error(f"{path}: {size / 2**30:.1f} GiB are to be read, {free / 2**30:.1f} GiB of memory are free")


def _free_bytes() -> int | None:
    """Memory and swap space that can still be taken; None where nobody says."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(rows[key].split()[0]) for key in ("MemAvailable", "SwapFree")) << 10
    except (OSError, ValueError, KeyError):
        return None


def tensor_shapes(path: str | Path, *, error: type[PeckerError] = DataError) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone; raises `error` as `read_tensors` does."""
    with _opened(path, error) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def empty_tensors(path: str | Path, *, error: type[PeckerError] = DataError) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device, from its header alone; raises `error` as `read_tensors` does."""
    import torch
    from safetensors.torch import _TYPES

    with _opened(path, error) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(s.get_shape(), dtype=_TYPES[s.get_dtype()], device="meta") for name, s in slices.items()
        }


def is_there(path: Path) -> bool:
    """Whether there is a regular file; a name that no disk takes, or a link to itself, is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_tensors(path: str | Path, *, error: type[PeckerError] = DataError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU, owning their memory) and metadata of a safetensors file.

    Raises `error` for a pickle under any name and for a missing, malformed or truncated file.
    """
    with _opened(path, error) as file:
        _check_memory(Path(path), error)
        # a copy, so that a file shortened later cannot fault the process through its memory map
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_head(path: str | Path, *, error: type[PeckerError] = DataError) -> tuple[frozenset[str], dict[str, str]]:
    """Names of the tensors and metadata of a safetensors file; no tensor is read. Raises `error` as `read_tensors`."""
    with _opened(path, error) as file:
        return frozenset(file.keys()), dict(file.metadata() or {})
