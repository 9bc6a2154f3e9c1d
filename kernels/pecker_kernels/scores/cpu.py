"""The door to csrc for scoring and selection; see scores.backend.Backend for every function.

Takes float32, bfloat16 and float16 CPU tensors; one that is not contiguous is copied first. Results do not depend on
the number of threads or the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NativeLibraryError
from ..native import library
from .backend import FIRST_BITS, SECOND_BITS, SECOND_SHIFT, THIRD_BITS, Census, grid

SAMPLED_FROM = None  # three passes of these kernels run at the speed of memory

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REDUCTIONS = ("sum", "abs", "square")


def _pointers(tensors: Iterable[Tensor | None]) -> Any:
    found = [0 if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def _longs(values: Iterable[int]) -> Any:
    found = list(values)
    return (ctypes.c_int64 * len(found))(*found)


class _Table:
    """The arrays that describe a list of tensors; keeps their copies alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if t.device.type != "cpu" or t.dtype not in _KINDS:
                raise NativeLibraryError(
                    f"the C++ selection takes float32, bfloat16 and float16 CPU tensors, got {t.dtype} on {t.device}"
                )
        self.tensors = [t.detach().contiguous() for t in tensors]
        self.arguments = (
            _pointers(self.tensors),
            _longs(t.numel() for t in self.tensors),
            (ctypes.c_int32 * len(self.tensors))(*[_KINDS[t.dtype] for t in self.tensors]),
            len(self.tensors),
        )


def _in_place(tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        if t.device.type != "cpu" or t.dtype != torch.float32 or not t.is_contiguous():
            raise NativeLibraryError(f"the C++ scores are contiguous float32 CPU tensors, got {t.dtype} on {t.device}")


def _empty_census(n: int) -> Census:
    return Census(torch.zeros(1 << FIRST_BITS, dtype=torch.int64), torch.zeros(n, dtype=torch.uint8))


def accumulate_(
    scores: Sequence[Tensor], grads: Sequence[Tensor | None], reduction: str, census: bool
) -> Census | None:
    _in_place(scores)
    taken: list[Tensor | None] = []
    for score, g in zip(scores, grads):
        if g is not None and (g.device.type != "cpu" or g.shape != score.shape):
            raise NativeLibraryError(f"a gradient is {list(g.shape)} on {g.device}, its score {list(score.shape)}")
        taken.append(g if g is None else (g.detach() if g.dtype in _KINDS else g.detach().float()).contiguous())
    found = _empty_census(len(scores)) if census else None
    library().pecker_accumulate(
        _pointers(scores),
        _pointers(taken),
        # Without a census, a score without a gradient need not be visited.
        _longs(s.numel() if census or g is not None else 0 for s, g in zip(scores, taken)),
        (ctypes.c_int32 * len(taken))(*[0 if g is None else _KINDS[g.dtype] for g in taken]),
        len(scores),
        _REDUCTIONS.index(reduction),
        found.counts.data_ptr() if found else None,
        found.faults.data_ptr() if found else None,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version([s for s, g in zip(scores, taken) if g is not None])
    return found


def rms_sums(square_sums: Sequence[Tensor], count: int) -> Tensor:
    _in_place(square_sums)
    sums = torch.empty(len(square_sums), dtype=torch.float64)
    library().pecker_rms_sums(
        _pointers(square_sums),
        _longs(s.numel() for s in square_sums),
        len(square_sums),
        count,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def contrast_(
    scores: Sequence[Tensor], square_sums: Sequence[Tensor], count: int, floor_value: float, magnitude: bool
) -> Census:
    _in_place(scores)
    _in_place(square_sums)
    found = _empty_census(len(scores))
    library().pecker_contrast(
        _pointers(scores),
        _pointers(square_sums),
        _longs(s.numel() for s in scores),
        len(scores),
        count,
        floor_value,
        magnitude,
        found.counts.data_ptr(),
        found.faults.data_ptr(),
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(list(scores))
    return found


def census(tensors: Sequence[Tensor], magnitude: bool) -> Census:
    table, found = _Table(tensors), _empty_census(len(tensors))
    library().pecker_census(
        *table.arguments, magnitude, found.counts.data_ptr(), found.faults.data_ptr(), torch.get_num_threads()
    )
    return found


def _digit(tensors: Sequence[Tensor], shift: int, prefix: int, length: int, pool: Tensor | None) -> tuple[Tensor, int]:
    table, counts = _Table(tensors), torch.zeros(length, dtype=torch.int64)
    hits = library().pecker_digit(
        *table.arguments,
        shift,
        prefix,
        counts.data_ptr(),
        None if pool is None else pool.data_ptr(),
        0 if pool is None else pool.numel(),
        torch.get_num_threads(),
    )
    return counts, hits


def second_histogram(
    tensors: Sequence[Tensor], magnitude: bool, prefix: int, expected: int
) -> tuple[Tensor, Tensor | None]:
    # A bin with more than an eighth of the values costs more to copy than to read again.
    small = expected <= sum(t.numel() for t in tensors) // 8 + 1024
    pool = torch.empty(expected, dtype=torch.float32) if small else None
    counts, hits = _digit(tensors, SECOND_SHIFT, prefix, 1 << SECOND_BITS, pool)
    return counts, pool if hits == expected else None


def third_histogram(tensors: Sequence[Tensor], magnitude: bool, prefix: int, pool: Tensor | None) -> Tensor:
    return _digit(tensors if pool is None else [pool], 0, prefix, 1 << THIRD_BITS, None)[0]


def _threshold_bits(tensors: Sequence[Tensor], threshold: float) -> Any:
    rounded = {
        dtype: int(torch.tensor(threshold, dtype=dtype).float().view(torch.int32)) & 0x7FFFFFFF
        for dtype in {t.dtype for t in tensors}
    }
    return (ctypes.c_uint32 * len(tensors))(*[rounded[t.dtype] for t in tensors])


def tie_counts(tensors: Sequence[Tensor], magnitude: bool, threshold: float) -> Tensor:
    table, ties = _Table(tensors), torch.zeros(len(tensors), dtype=torch.int64)
    library().pecker_tie_counts(
        *table.arguments, magnitude, _threshold_bits(tensors, threshold), ties.data_ptr(), torch.get_num_threads()
    )
    return ties


def keep_bits(
    tensors: Sequence[Tensor], magnitude: bool, threshold: float, rooms: Sequence[int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    table = _Table(tensors)
    bits = [torch.empty((t.numel() + 7) // 8, dtype=torch.uint8) for t in tensors]
    ones, faults = torch.zeros(len(tensors), dtype=torch.int64), torch.zeros(len(tensors), dtype=torch.uint8)
    library().pecker_keep_bits(
        *table.arguments,
        magnitude,
        _threshold_bits(tensors, threshold),
        _longs(rooms),
        _pointers(bits),
        ones.data_ptr(),
        faults.data_ptr(),
        torch.get_num_threads(),
    )
    return bits, ones, faults


def block_sums(tensor: Tensor, height: int, width: int, magnitude: bool) -> Tensor:
    table, (rows, columns) = _Table([tensor]), grid(tensor.shape)
    sums = torch.empty(-(-rows // height) * -(-columns // width), dtype=torch.float64)
    library().pecker_block_sums(
        table.tensors[0].data_ptr(),
        _KINDS[tensor.dtype],
        rows,
        columns,
        height,
        width,
        magnitude,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def block_bits(kept: Tensor, shape: Sequence[int], height: int, width: int) -> Tensor:
    rows, columns = grid(shape)
    if kept.device.type != "cpu" or kept.numel() != -(-rows // height) * -(-columns // width):
        raise NativeLibraryError(f"kept is [{kept.numel()}] on {kept.device}: one CPU flag per block is expected")
    kept, bits = kept.contiguous(), torch.empty((rows * columns + 7) // 8, dtype=torch.uint8)
    library().pecker_block_bits(kept.data_ptr(), rows, columns, height, width, bits.data_ptr(), torch.get_num_threads())
    return bits
