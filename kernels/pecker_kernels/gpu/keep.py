"""The keep bits of a threshold on the GPU, written packed: scores above it, and of the ties the first in flat order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scores.backend import ALL_TIES
from .registry import KernelBuild
from .table import TRITON_TYPES, Table, block_start, load_bits, table, values_left
from .threshold import _NEGATIVE, _NOT_FINITE, BLOCK, WARPS, by_dtype


def tie_bytes_moved(n: int, element_size: int) -> float:
    """Every score is read once; no floating operations (scores are compared as integers)."""
    return element_size * n


def keep_bytes_moved(n: int, element_size: int) -> float:
    """Every score is read once, a bit per weight written; no floating operations."""
    return element_size * n + n / 8


@triton.jit
def _order(raw, MAGNITUDE: tl.constexpr):
    """float32 patterns -> integers that order like the values (like |value|); -0.0 equals +0.0."""
    key = raw & 0x7FFFFFFF
    if MAGNITUDE:
        return key
    else:
        return tl.where(raw < 0, -key, key)


@triton.jit
def _above(score, cut):
    """cut < score ≤ inf, by one comparison: what is not above wraps around, NaN lies above inf. cut ≥ −1."""
    limit = (tl.full((), 0x7F800000, tl.int32) - cut).to(tl.uint32, bitcast=True)
    return (score - (cut + 1)).to(tl.uint32, bitcast=True) < limit


@triton.jit
def _faults(raw, score, MAGNITUDE: tl.constexpr):
    """NOT_FINITE and NEGATIVE of a block, dead lanes 0."""
    bad = tl.where(tl.max(raw & 0x7FFFFFFF, axis=0) >= 0x7F800000, _NOT_FINITE, 0)
    if not MAGNITUDE:
        bad |= tl.where(tl.min(score, axis=0) < 0, _NEGATIVE, 0)
    return bad


@triton.jit
def _ones(word):
    """Bits that are set in each int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 255


@triton.jit(do_not_specialize=["cut"])
def ties_kernel(
    chunks, rows, ties, cut: tl.int32,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ties[block] = values equal to the float32 pattern `cut`."""
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 3 * tensor
    left = values_left(start, tl.load(row + 1), BLOCK)
    score = _order(load_bits(row, start, left, KIND, ALIGNED, BLOCK), MAGNITUDE)
    tie = (score == cut) & (tl.arange(0, BLOCK) < left)
    tl.store(ties + tl.program_id(0), tl.sum(tie.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["cut"])
def keep_kernel(
    chunks, rows, rooms, before, counts, faults, cut: tl.int32,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, RANKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RANKED: before[block] ties come earlier in the tensor, the first rooms[tensor] of all are kept. Else all ties are,
    or none where rooms[tensor] is 0."""
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 4 * tensor
    left = values_left(start, tl.load(row + 2), BLOCK)
    slot = tl.load(row + 3)
    raw = load_bits(row, start, left, KIND, ALIGNED, BLOCK)  # 0 behind the end
    score = _order(raw, MAGNITUDE)
    # inf, NaN and what lies below zero are the largest as unsigned numbers: one maximum, and a second look where there is one
    if tl.max(score.to(tl.uint32, bitcast=True), axis=0) >= 0x7F800000:
        bad = _faults(raw, score, MAGNITUDE)
        tl.atomic_or(faults + slot, bad, mask=bad != 0, sem="relaxed")

    room = tl.load(rooms + tensor)
    if RANKED:
        keep = _above(score, cut)
        tie = score == cut
        if left < BLOCK:
            tie = tie & (tl.arange(0, BLOCK) < left)
        rank = tl.load(before + tl.program_id(0)) + tl.cumsum(tie.to(tl.int32), axis=0)
        keep |= tie & (rank <= room)
    else:
        keep = _above(score, cut - (room != 0).to(tl.int32))
    if left < BLOCK:
        keep = keep & (tl.arange(0, BLOCK) < left)
    one = tl.full((), 1, tl.int32) << tl.arange(0, 32)
    words = tl.sum(tl.where(tl.reshape(keep, [BLOCK // 32, 32]), one[None, :], 0), axis=1)
    tl.atomic_add(counts + slot, tl.sum(_ones(words), axis=0).to(tl.int64), sem="relaxed")
    address = tl.load(row + 1) + start // 8
    word = tl.arange(0, BLOCK // 32)
    if left == BLOCK:
        tl.store(address.to(tl.pointer_type(tl.int32)) + word, words)
    else:  # the last byte of a tensor's bits need not end a word
        byte = 4 * word[:, None] + tl.arange(0, 4)[None, :]
        value = (words[:, None] >> (8 * tl.arange(0, 4)[None, :])) & 255
        tl.store(address.to(tl.pointer_type(tl.uint8)) + byte, value.to(tl.uint8), mask=byte * 8 < left)


def pattern(threshold: float, dtype: torch.dtype) -> int:
    """The float32 pattern of a threshold ≥ 0 rounded to the scores' dtype, as torch rounds it in a comparison."""
    return int(torch.tensor(threshold, dtype=dtype).float().abs().view(torch.int32))


def _count_ties(launch: Table, dtype: torch.dtype, magnitude: bool, threshold: float) -> Tensor:
    ties = torch.empty(launch.grid[0], dtype=torch.int32, device=launch.chunks.device)
    ties_kernel[launch.grid](
        launch.chunks, launch.rows, ties, pattern(threshold, dtype),
        TRITON_TYPES[dtype], magnitude, launch.aligned, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return ties.to(torch.int64)


def _sums_by_tensor(launch: Table, values: Tensor) -> Tensor:
    """int64 [tensors]: sums of a value per block."""
    running = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    return running[launch.first[1:]] - running[launch.first[:-1]]


def tie_counts(tensors: Sequence[Tensor], magnitude: bool, threshold: float) -> Tensor:
    """int64 [tensors]: values equal to the threshold in each contiguous tensor; the list is not empty."""
    out = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for dtype, group in by_dtype(tensors):
        launch = table([[tensors[i] for i in group]], BLOCK)
        out[group] = _sums_by_tensor(launch, _count_ties(launch, dtype, magnitude, threshold))
    return out


def keep_bits(
    tensors: Sequence[Tensor], magnitude: bool, threshold: float, rooms: Sequence[int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(bits, counts, int32 faults) of scores.backend for contiguous tensors; the list is not empty."""
    device = tensors[0].device
    bits = [torch.empty((t.numel() + 7) // 8, dtype=torch.uint8, device=device) for t in tensors]
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    faults = torch.zeros(len(tensors), dtype=torch.int32, device=device)
    for dtype, group in by_dtype(tensors):
        for ranked in (False, True):
            chosen = [i for i in group if (rooms[i] not in (0, ALL_TIES)) == ranked]
            if not chosen:
                continue
            scores = [tensors[i] for i in chosen]
            before = counts
            if ranked:
                launch = table([scores], BLOCK)
                ties = _count_ties(launch, dtype, magnitude, threshold)
                before = ties.cumsum(0) - ties
                before -= before[launch.first[:-1]][launch.chunks[:, 0]]
            launch = table([scores, [bits[i] for i in chosen]], BLOCK, chosen)
            room = torch.tensor([rooms[i] for i in chosen], dtype=torch.int64, device=device)
            keep_kernel[launch.grid](
                launch.chunks, launch.rows, room, before, counts, faults, pattern(threshold, dtype),
                TRITON_TYPES[dtype], magnitude, ranked, launch.aligned, BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return bits, counts, faults


_TABLES = {"chunks": "*i32", "rows": "*i64"}
_KEEP = {**_TABLES, "rooms": "*i64", "before": "*i64", "counts": "*i64", "faults": "*i32", "cut": "i32"}
COMPILE = [
    *(
        KernelBuild(
            f"ties_{kind}",
            ties_kernel,
            {**_TABLES, "ties": "*i32", "cut": "i32"},
            {"KIND": kind, "MAGNITUDE": True, "ALIGNED": True, "BLOCK": BLOCK},
            WARPS,
            128,
        )
        for kind in TRITON_TYPES.values()
    ),
    *(
        KernelBuild(
            f"keep_{kind}{'_ranked' if ranked else ''}",
            keep_kernel,
            _KEEP,
            {"KIND": kind, "MAGNITUDE": False, "RANKED": ranked, "ALIGNED": True, "BLOCK": BLOCK},
            WARPS,
            128,
        )
        for kind, ranked in ((tl.float32, False), (tl.float32, True), (tl.bfloat16, True), (tl.float16, True))
    ),
    KernelBuild(
        "keep_fp32_ranked_unaligned",
        keep_kernel,
        _KEEP,
        {"KIND": tl.float32, "MAGNITUDE": False, "RANKED": True, "ALIGNED": False, "BLOCK": BLOCK},
        WARPS,
        scalar=True,
    ),
]
