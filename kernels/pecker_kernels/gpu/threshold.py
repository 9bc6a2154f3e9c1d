"""Radix-select histograms on the GPU: a score's key is the 31 low bits of its float32 pattern, which order like |score|.

Three passes count the top 11, the next 10 and the last 10 bits of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import PeckerKernelsError
from ..scores.backend import FIRST_BITS, FIRST_SHIFT, NEGATIVE, NOT_FINITE, SECOND_BITS, SECOND_SHIFT
from .registry import KernelBuild
from .table import TRITON_TYPES, block_start, load_bits, table, values_left

BLOCK = 4096
WARPS = 8
# Bins that one round of add_digits counts inside the block: a digit of the first pass has 8 bins per factor of two.
WINDOW = 128
# Histograms in global memory that the blocks share out, so that fewer of them meet at one address.
REPLICAS = 8
# Keys of one bin are collected for the third pass where they are at most this share of all values.
POOL_SHARE = 1 / 8

_SHIFT, _NEGATIVE, _NOT_FINITE = tl.constexpr(FIRST_SHIFT), tl.constexpr(NEGATIVE), tl.constexpr(NOT_FINITE)
_FIRST_BINS, _BINS, _BITS = tl.constexpr(1 << FIRST_BITS), tl.constexpr(1 << SECOND_BITS), tl.constexpr(SECOND_BITS)


def census_bytes_moved(n: int, element_size: int) -> float:
    """Every score is read once; no floating operations."""
    return element_size * n


def digits_bytes_moved(n: int, element_size: int, pooled: int) -> float:
    """The second pass reads every score and writes the pool, the third reads the pool; without one it reads all again.
    No floating operations."""
    return element_size * n + (8 * pooled if pooled else element_size * n)


@triton.jit
def add_digits(counts, digit, live, FEW: tl.constexpr, WINDOW: tl.constexpr):
    """counts[digit] += 1 for every live lane, with integer atomics.

    Equal digits meet inside the block first: zeros are summed, and while more than FEW lanes are left, the WINDOW bins
    below the largest digit are counted in the block. So equal scores cost one addition a block and spread ones at most
    bins / WINDOW rounds, whatever the data.
    """
    # Two counts in one sum: a block has fewer than 2**15 lanes.
    both = tl.sum(tl.where(live, tl.where(digit == 0, 1 << 16, 1), 0), axis=0)
    zeros, left = both >> 16, both & 0xFFFF
    tl.atomic_add(counts, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")
    live = live & (digit != 0)
    while left > FEW:
        top = tl.max(tl.where(live, digit, 0), axis=0)
        below = top - digit
        inside = live & (below < WINDOW)
        found = tl.histogram(tl.where(inside, below, 0), WINDOW, mask=inside)
        bins = top - tl.arange(0, WINDOW)
        tl.atomic_add(counts + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")
        live = live & (below >= WINDOW)
        left -= tl.sum(found, axis=0)
    if left > 0:
        tl.atomic_add(counts + digit, tl.full(digit.shape, 1, tl.int64), mask=live, sem="relaxed")


@triton.jit
def replica(counts, BINS: tl.constexpr, REPLICAS: tl.constexpr):
    return counts + (tl.program_id(0) % REPLICAS) * BINS


@triton.jit
def faults_of(raw, live, MAGNITUDE: tl.constexpr):
    """NOT_FINITE and NEGATIVE of a block of float32 patterns."""
    key = tl.where(live, raw & 0x7FFFFFFF, 0)
    if MAGNITUDE:
        return tl.where(tl.max(key, axis=0) >= 0x7F800000, _NOT_FINITE, 0)
    else:
        # Two counts in one sum, as in add_digits.
        both = tl.sum(tl.where(key >= 0x7F800000, 1, 0) + tl.where((raw < 0) & (key != 0), 1 << 16, 0), axis=0)
        return tl.where((both & 0xFFFF) != 0, _NOT_FINITE, 0) | tl.where(both >> 16 != 0, _NEGATIVE, 0)


@triton.jit
def take_census(
    raw, live, counts, fault, MAGNITUDE: tl.constexpr, FEW: tl.constexpr, WINDOW: tl.constexpr, REPLICAS: tl.constexpr
):
    """Adds a block of float32 patterns to the first histogram and its faults to `fault`."""
    bad = faults_of(raw, live, MAGNITUDE)
    tl.atomic_or(fault, bad, mask=bad != 0, sem="relaxed")
    add_digits(replica(counts, _FIRST_BINS, REPLICAS), (raw & 0x7FFFFFFF) >> _SHIFT, live, FEW, WINDOW)


@triton.jit
def census_kernel(
    chunks, rows, counts, faults,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, ALIGNED: tl.constexpr,
    FEW: tl.constexpr, WINDOW: tl.constexpr, REPLICAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 3 * tensor
    left = values_left(start, tl.load(row + 1), BLOCK)
    raw = load_bits(row, start, left, KIND, ALIGNED, BLOCK)
    live = tl.arange(0, BLOCK) < left
    take_census(raw, live, counts, faults + tl.load(row + 2), MAGNITUDE, FEW, WINDOW, REPLICAS)


@triton.jit(do_not_specialize=["prefix", "capacity"])
def digits_kernel(
    chunks, rows, counts, pool, filled, prefix: tl.int32, capacity: tl.int64,
    KIND: tl.constexpr, SHIFT: tl.constexpr, POOL: tl.constexpr, ALIGNED: tl.constexpr,
    FEW: tl.constexpr, WINDOW: tl.constexpr, REPLICAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 3 * tensor
    left = values_left(start, tl.load(row + 1), BLOCK)
    key = load_bits(row, start, left, KIND, ALIGNED, BLOCK) & 0x7FFFFFFF
    live = ((key >> (SHIFT + _BITS)) == prefix) & (tl.arange(0, BLOCK) < left)
    if POOL:
        place = tl.cumsum(live.to(tl.int32), axis=0)
        total = tl.sum(live.to(tl.int32), axis=0)
        if total > 0:
            # The order of the pool is open: only its histogram is taken.
            at = tl.atomic_add(filled, total.to(tl.int64), sem="relaxed") + place - 1
            tl.store(pool + at, key, mask=live & (at < capacity))
    add_digits(replica(counts, _BINS, REPLICAS), (key >> SHIFT) & (_BINS - 1), live, FEW, WINDOW)


def shared_counts(bins: int, device: torch.device) -> Tensor:
    """int64 [REPLICAS, bins] for the kernels to add to."""
    return torch.zeros(REPLICAS, bins, dtype=torch.int64, device=device)


def by_dtype(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, list[int]]]:
    """The non-empty tensors by dtype: one launch each. Raises PeckerKernelsError for a dtype without a kernel."""
    found: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(tensors):
        if t.dtype not in TRITON_TYPES:
            raise PeckerKernelsError(f"the Triton selection takes float32, float16 and bfloat16 scores, got {t.dtype}")
        if t.numel():
            found.setdefault(t.dtype, []).append(i)
    return list(found.items())


def settings() -> dict[str, int]:
    """The compile-time arguments of every kernel that counts."""
    return {"FEW": BLOCK // 16, "WINDOW": WINDOW, "REPLICAS": REPLICAS, "BLOCK": BLOCK, "num_warps": WARPS}


def add_census(tensors: Sequence[Tensor], magnitude: bool, counts: Tensor, faults: Tensor, at: Sequence[int]) -> None:
    """Add contiguous tensors to int64 [REPLICAS, 2048] counts and to the int32 faults at the places `at`."""
    for dtype, group in by_dtype(tensors):
        launch = table([[tensors[i] for i in group]], BLOCK, [at[i] for i in group])
        census_kernel[launch.grid](
            launch.chunks, launch.rows, counts, faults, TRITON_TYPES[dtype], magnitude, launch.aligned, **settings()
        )


def digit_counts(tensors: Sequence[Tensor], prefix: int, shift: int, pool: Tensor | None) -> Tensor:
    """int64 [1024]: the 10 key bits from `shift` of the contiguous tensors' keys whose higher bits equal `prefix`.

    pool: int32 [number of such keys], filled with them in any order. The tensors are on one device and not all empty.
    """
    device = tensors[0].device
    counts, filled = shared_counts(1 << SECOND_BITS, device), torch.zeros(1, dtype=torch.int64, device=device)
    for dtype, group in by_dtype(tensors):
        launch = table([[tensors[i] for i in group]], BLOCK)
        digits_kernel[launch.grid](
            launch.chunks, launch.rows, counts, filled if pool is None else pool, filled, prefix,
            0 if pool is None else pool.numel(), TRITON_TYPES[dtype], shift, pool is not None, launch.aligned,
            **settings(),
        )  # fmt: skip
    return counts.sum(0)


_TABLES = {"chunks": "*i32", "rows": "*i64", "counts": "*i64"}
_COUNTING = {k: v for k, v in settings().items() if k != "num_warps"}
_DIGITS = {**_TABLES, "pool": "*i32", "filled": "*i64", "prefix": "i32", "capacity": "i64"}
_FP32, _OTHERS = tl.float32, (tl.bfloat16, tl.float16)
COMPILE = [
    *(
        KernelBuild(
            f"census_{kind}{'_magnitude' if magnitude else ''}",
            census_kernel,
            {**_TABLES, "faults": "*i32"},
            {"KIND": kind, "MAGNITUDE": magnitude, "ALIGNED": True, **_COUNTING},
            WARPS,
            128,
        )
        for kind, magnitude in ((_FP32, False), (_FP32, True), *((kind, False) for kind in _OTHERS))
    ),
    *(
        KernelBuild(
            f"digits_{kind}_{shift}{'_pool' if pool else ''}",
            digits_kernel,
            _DIGITS,
            {"KIND": kind, "SHIFT": shift, "POOL": pool, "ALIGNED": True, **_COUNTING},
            WARPS,
            128,
        )
        for kind, shift, pool in (
            (_FP32, SECOND_SHIFT, True),
            (_FP32, SECOND_SHIFT, False),
            (_FP32, 0, False),
            *((kind, SECOND_SHIFT, True) for kind in _OTHERS),
        )
    ),
    KernelBuild(
        "digits_fp32_10_pool_unaligned",
        digits_kernel,
        _DIGITS,
        {"KIND": _FP32, "SHIFT": SECOND_SHIFT, "POOL": True, "ALIGNED": False, **_COUNTING},
        WARPS,
        scalar=True,
    ),
]
