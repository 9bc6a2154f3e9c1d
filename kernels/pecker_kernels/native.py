"""The door to csrc: ctypes calls into libpecker_cpu, on contiguous CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from .errors import NativeLibraryError

LIBRARY = "libpecker_cpu.so"
ABI_VERSION = 6
RANK_BLOCK = 4096  # kBlock in csrc/adam.h
LEVELS = ("scalar", "avx2", "avx512")


def find_library() -> Path | None:
    """Path of the compiled library, or None.

    An editable install keeps the Python files in the source tree and the library in site-packages: both are on the
    package's __path__.
    """
    for folder in sys.modules[__package__].__path__:
        path = Path(folder) / "_native" / LIBRARY
        if path.is_file():
            return path
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeLibraryError when it is absent or was built from other sources."""
    path = find_library()
    if path is None:
        raise NativeLibraryError(
            f"{LIBRARY} is not installed: install the package with a C++ compiler present, or use impl='reference'"
        )
    try:
        lib = ctypes.CDLL(str(path))
        lib.pecker_abi_version.restype = ctypes.c_int
        version = lib.pecker_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path} cannot be loaded: {error}; reinstall the package") from error
    if version != ABI_VERSION:
        raise NativeLibraryError(f"{path} has ABI version {version}, expected {ABI_VERSION}: reinstall the package")
    pointer, i64, i32, u32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_float
    table = [pointer, pointer, pointer, i64]  # data, n, kinds, count
    for name, result, arguments in (
        ("pecker_cpu_level", i32, []),
        ("pecker_cpu_level_max", i32, []),
        ("pecker_set_cpu_level", i32, [i32]),
        ("pecker_set_openmp", None, [pointer]),
        ("pecker_pack", None, [pointer, i64, pointer, i32]),
        ("pecker_unpack", None, [pointer, i64, pointer, i32]),
        ("pecker_popcount", i64, [pointer, i64, i32]),
        ("pecker_apply", i32, [pointer, i64, i32, pointer, i32]),
        ("pecker_rank", None, [pointer, i64, pointer]),
        ("pecker_adam", i32, [pointer, i64, pointer, i32]),
        ("pecker_advance", None, [pointer, i64]),
        ("pecker_grad_stats", i32, [pointer, i64, pointer, pointer, i32]),
        ("pecker_accumulate", None, [pointer, *table, i32, pointer, pointer, i32]),
        ("pecker_rms_sums", None, [pointer, pointer, i64, i64, pointer, i32]),
        ("pecker_contrast", None, [pointer, pointer, pointer, i64, i64, f32, i32, pointer, pointer, i32]),
        ("pecker_census", None, [*table, i32, pointer, pointer, i32]),
        ("pecker_digit", i64, [*table, i32, u32, pointer, pointer, i64, i32]),
        ("pecker_tie_counts", None, [*table, i32, pointer, pointer, i32]),
        ("pecker_keep_bits", None, [*table, i32, pointer, pointer, pointer, pointer, pointer, i32]),
        ("pecker_block_sums", None, [pointer, i32, i64, i64, i64, i64, i32, pointer, i32]),
        ("pecker_block_bits", None, [pointer, i64, i64, i64, i64, pointer, i32]),
        ("pecker_norm_silu", None, [*6 * [pointer], *4 * [i64], f32, *3 * [i32]]),
        ("pecker_norm_silu_backward", None, [*10 * [pointer], *4 * [i64], *3 * [i32]]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.pecker_set_openmp(openmp_of_torch())
    return lib


def openmp_of_torch() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch runs on, None where it has none.

    A second runtime would ignore torch.set_num_threads and spin on the cores torch wants next.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def available() -> bool:
    """Whether the compiled library can be used."""
    try:
        library()
    except NativeLibraryError:
        return False
    return True


def cpu_level() -> int:
    """Instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512."""
    return library().pecker_cpu_level()


def cpu_level_max() -> int:
    """Highest level this machine has."""
    return library().pecker_cpu_level_max()


def set_cpu_level(level: int) -> None:
    """Choose the instruction set (all threads of the process). Raises NativeLibraryError when the machine lacks it."""
    if library().pecker_set_cpu_level(level):
        raise NativeLibraryError(f"CPU level {level} is not available here, the highest is {cpu_level_max()}")


def _ready(name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise NativeLibraryError(f"{name} is on {tensor.device}: the C++ kernels take CPU tensors")
    return tensor


def _byte_tensor(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.uint8, torch.bool):
        raise NativeLibraryError(f"{name} is {tensor.dtype}: expected bool or uint8")
    return _ready(name, tensor).contiguous()


def _bits_for(bits: Tensor, n: int) -> Tensor:
    if bits.numel() != (n + 7) // 8:
        raise NativeLibraryError(f"bits has {bits.numel()} bytes, {n} weights need {(n + 7) // 8}")
    return _byte_tensor("bits", bits)


def pack_bits(keep: Tensor) -> Tensor:
    """See reference.pack_bits."""
    keep = _byte_tensor("keep", keep)
    bits = torch.empty((keep.numel() + 7) // 8, dtype=torch.uint8)
    library().pecker_pack(keep.data_ptr(), keep.numel(), bits.data_ptr(), torch.get_num_threads())
    return bits


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """See reference.unpack_bits."""
    bits = _bits_for(bits, n)
    keep = torch.empty(n, dtype=torch.bool)
    library().pecker_unpack(bits.data_ptr(), n, keep.data_ptr(), torch.get_num_threads())
    return keep


def popcount(bits: Tensor) -> int:
    """See reference.popcount."""
    bits = _byte_tensor("bits", bits)
    return library().pecker_popcount(bits.data_ptr(), bits.numel(), torch.get_num_threads())


def apply_(tensor: Tensor, bits: Tensor) -> Tensor:
    """See reference.apply_; contiguous tensors with 2, 4 or 8 bytes an element."""
    if not tensor.is_contiguous():
        raise NativeLibraryError("the C++ apply takes contiguous tensors")
    bits = _bits_for(bits, tensor.numel())
    _ready("tensor", tensor)
    if library().pecker_apply(
        tensor.data_ptr(), tensor.numel(), tensor.element_size(), bits.data_ptr(), torch.get_num_threads()
    ):
        raise NativeLibraryError(f"the C++ apply has no kernel for {tensor.dtype}")
    # The write happened behind autograd's back.
    torch.autograd.graph.increment_version(tensor)
    return tensor


def rank_of(bits: Tensor, n: int) -> Tensor:
    """int64 [ceil(n / 4096) + 1]: ones before each block of 4096 weights, and in all."""
    rank = torch.empty((n + RANK_BLOCK - 1) // RANK_BLOCK + 1, dtype=torch.int64)
    library().pecker_rank(bits.data_ptr(), n, rank.data_ptr())
    return rank
