"""Saliency scores on the GPU: accumulation and contrast in place, over all tensors in one launch, the first histogram of
the new scores taken in the same pass (PECKER 2604.05634, Eq. 8-9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import KernelBuild
from .table import TRITON_TYPES, block_start, load_block, pointer, store_block, table, values_left
from .threshold import BLOCK, WARPS, settings, take_census

REDUCTIONS = {"sum": 0, "abs": 1, "square": 2}


def accumulate_flops(n: int) -> int:
    """score + g·g; "sum" and "abs" take one operation less."""
    return 2 * n


def accumulate_bytes_moved(n: int, grad_size: int) -> int:
    """Scores read and written, gradients read."""
    return (8 + grad_size) * n


def contrast_flops(n: int) -> int:
    """Two divisions, a root and an addition."""
    return 4 * n


def contrast_bytes_moved(n: int) -> int:
    """Scores read and written, square sums read."""
    return 12 * n


def rms_flops(n: int) -> int:
    """A division, a root and an addition."""
    return 3 * n


def rms_bytes_moved(n: int) -> int:
    """Square sums read."""
    return 4 * n


@triton.jit
def accumulate_kernel(
    chunks, rows, counts, faults,
    KIND: tl.constexpr, REDUCTION: tl.constexpr, CENSUS: tl.constexpr, ALIGNED: tl.constexpr,
    FEW: tl.constexpr, WINDOW: tl.constexpr, REPLICAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """score += g | |g| | g·g in float32."""
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 4 * tensor
    left = values_left(start, tl.load(row + 2), BLOCK)
    scores = pointer(row, tl.float32, ALIGNED)
    grad = load_block(pointer(row + 1, KIND, ALIGNED), start, left, BLOCK).to(tl.float32)
    score = load_block(scores, start, left, BLOCK)
    if REDUCTION == 0:
        score += grad
    elif REDUCTION == 1:
        score += tl.abs(grad)
    else:
        score += grad * grad
    store_block(scores, start, left, score, BLOCK)
    if CENSUS:
        live = tl.arange(0, BLOCK) < left
        raw = score.to(tl.int32, bitcast=True)
        take_census(raw, live, counts, faults + tl.load(row + 3), REDUCTION == 0, FEW, WINDOW, REPLICAS)


@triton.jit(do_not_specialize=["count", "floor_value"])
def contrast_kernel(
    chunks, rows, counts, faults, count: tl.float32, floor_value: tl.float32,
    MAGNITUDE: tl.constexpr, CENSUS: tl.constexpr, ALIGNED: tl.constexpr,
    FEW: tl.constexpr, WINDOW: tl.constexpr, REPLICAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """score = s / (sqrt(square_sum / count) + floor_value), rounded like torch's division and root."""
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 4 * tensor
    left = values_left(start, tl.load(row + 2), BLOCK)
    scores = pointer(row, tl.float32, ALIGNED)
    squares = load_block(pointer(row + 1, tl.float32, ALIGNED), start, left, BLOCK)
    score = load_block(scores, start, left, BLOCK)
    if MAGNITUDE:
        score = tl.abs(score)
    score = tl.div_rn(score, tl.sqrt_rn(tl.div_rn(squares, tl.zeros_like(squares) + count)) + floor_value)
    store_block(scores, start, left, score, BLOCK)
    if CENSUS:
        live = tl.arange(0, BLOCK) < left
        raw = score.to(tl.int32, bitcast=True)
        take_census(raw, live, counts, faults + tl.load(row + 3), MAGNITUDE, FEW, WINDOW, REPLICAS)


@triton.jit(do_not_specialize=["count"])
def rms_kernel(chunks, rows, partial, count: tl.float32, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """partial[block] = Σ sqrt(s / count), the root in float32, the sum in float64."""
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 3 * tensor
    squares = load_block(pointer(row, tl.float32, ALIGNED), start, values_left(start, tl.load(row + 1), BLOCK), BLOCK)
    root = tl.sqrt_rn(tl.div_rn(squares, tl.zeros_like(squares) + count))
    tl.store(partial + tl.program_id(0), tl.sum(root.to(tl.float64), axis=0))


@triton.jit
def sum_parts_kernel(partial, first, sums, BLOCK: tl.constexpr):
    """sums[t] = Σ partial[first[t] : first[t + 1]], in an order that depends on the number of parts alone."""
    begin, end = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    total = tl.zeros([BLOCK], tl.float64)
    while begin < end:
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < end, other=0)
        begin += BLOCK
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def accumulate(
    scores: Sequence[Tensor], grads: Sequence[Tensor], reduction: str, counts: Tensor, faults: Tensor, census: bool,
    at: Sequence[int],
) -> None:  # fmt: skip
    """Contiguous non-empty float32 scores, contiguous gradients of one dtype; the census of the new scores is added to
    int64 [REPLICAS, 2048] counts and, at the places `at`, to int32 faults."""
    launch = table([scores, grads], BLOCK, at)
    accumulate_kernel[launch.grid](
        launch.chunks, launch.rows, counts, faults, TRITON_TYPES[grads[0].dtype], REDUCTIONS[reduction], census,
        launch.aligned, **settings(),
    )  # fmt: skip


def contrast(
    scores: Sequence[Tensor], squares: Sequence[Tensor], count: int, floor_value: float, magnitude: bool,
    counts: Tensor, faults: Tensor, census: bool,
) -> None:  # fmt: skip
    """Contiguous float32 tensors of equal shapes, not all empty; counts, faults and census as in `accumulate`."""
    launch = table([scores, squares], BLOCK)
    contrast_kernel[launch.grid](
        launch.chunks,
        launch.rows,
        counts,
        faults,
        float(count),
        floor_value,
        magnitude,
        census,
        launch.aligned,
        **settings(),
    )


def rms_sums(squares: Sequence[Tensor], count: int) -> Tensor:
    """float64 [tensors]: Σ sqrt(s / count) of contiguous float32 tensors, not all empty."""
    launch = table([squares], BLOCK)
    device = squares[0].device
    partial = torch.empty(launch.grid[0], dtype=torch.float64, device=device)
    sums = torch.empty(len(squares), dtype=torch.float64, device=device)
    rms_kernel[launch.grid](launch.chunks, launch.rows, partial, float(count), launch.aligned, BLOCK, num_warps=WARPS)
    sum_parts_kernel[(len(squares),)](partial, launch.first, sums, 1024, num_warps=WARPS)
    return sums


_TABLES = {"chunks": "*i32", "rows": "*i64"}
_CENSUS = {**_TABLES, "counts": "*i64", "faults": "*i32"}
_COUNTING = {k: v for k, v in settings().items() if k != "num_warps"}
COMPILE = [
    *(
        KernelBuild(
            f"accumulate_{name}_{kind}{'_census' if census else ''}",
            accumulate_kernel,
            _CENSUS,
            {"KIND": kind, "REDUCTION": REDUCTIONS[name], "CENSUS": census, "ALIGNED": True, **_COUNTING},
            WARPS,
            128,
            128,
        )
        for name, kind, census in (
            ("sum", tl.float32, False),
            ("abs", tl.float32, False),
            ("square", tl.float32, False),
            ("sum", tl.float32, True),
            ("square", tl.float32, True),
            ("square", tl.bfloat16, True),
            ("square", tl.float16, True),
        )
    ),
    KernelBuild(
        "accumulate_square_bf16_census_unaligned",
        accumulate_kernel,
        _CENSUS,
        {"KIND": tl.bfloat16, "REDUCTION": 2, "CENSUS": True, "ALIGNED": False, **_COUNTING},
        WARPS,
        scalar=True,
    ),
    *(
        KernelBuild(
            f"contrast{'_magnitude' if magnitude else ''}{'' if census else '_alone'}",
            contrast_kernel,
            {**_CENSUS, "count": "fp32", "floor_value": "fp32"},
            {"MAGNITUDE": magnitude, "CENSUS": census, "ALIGNED": True, **_COUNTING},
            WARPS,
            128,
            128,
        )
        for magnitude, census in ((False, True), (True, True), (True, False))
    ),
    KernelBuild(
        "rms",
        rms_kernel,
        {**_TABLES, "partial": "*fp64", "count": "fp32"},
        {"ALIGNED": True, "BLOCK": BLOCK},
        WARPS,
        128,
    ),
    KernelBuild(
        "sum_parts", sum_parts_kernel, {"partial": "*fp64", "first": "*i64", "sums": "*fp64"}, {"BLOCK": 1024}, WARPS
    ),
]
