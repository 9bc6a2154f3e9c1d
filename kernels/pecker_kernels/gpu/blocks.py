"""Block structures on the GPU: sums over rows and tiles, and the keep bits of chosen blocks.

A tensor is read as a matrix [shape[0], rest]; its height x width blocks are numbered row-major, edges ragged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scores.backend import grid as matrix_of
from .registry import KernelBuild
from .table import TRITON_TYPES

# Values per program.
BLOCK = 4096
WARPS = 8


def sums_flops(n: int) -> int:
    """One addition a value."""
    return n


def sums_bytes_moved(n: int, element_size: int) -> int:
    """Every score is read once."""
    return element_size * n


def bits_bytes_moved(n: int) -> float:
    """A bit per weight written; the blocks' choice is small. No floating operations."""
    return n / 8


@triton.jit(do_not_specialize=["rows", "columns", "height", "width", "across", "parts", "parts_across"])
def sums_kernel(
    scores, partial,
    rows: tl.int64, columns: tl.int64, height: tl.int64, width: tl.int64,
    across: tl.int64, parts: tl.int64, parts_across: tl.int64,
    MAGNITUDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """partial[block, part] = Σ scores over a DOWN x ACROSS part of the block, in float64."""
    program = tl.program_id(0).to(tl.int64)
    block, part = program // parts, program % parts
    top, first = (block // across) * height, (block % across) * width
    bottom, last = tl.minimum(top + height, rows), tl.minimum(first + width, columns)
    row = top + (part // parts_across) * DOWN + tl.arange(0, DOWN)
    column = first + (part % parts_across) * ACROSS + tl.arange(0, ACROSS)
    inside = (row < bottom)[:, None] & (column < last)[None, :]
    value = tl.load(scores + row[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float64)
    if MAGNITUDE:
        value = tl.abs(value)
    tl.store(partial + program, tl.sum(tl.sum(value, axis=1), axis=0))


@triton.jit(do_not_specialize=["n", "columns", "height", "width", "across"])
def bits_kernel(
    kept, bits, n: tl.int64, columns: tl.int32, height: tl.int32, width: tl.int32, across: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bits[i] = kept[block of weight i]."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    # Two divisions by a scalar in 64 bits, all others in 32.
    along = (start % columns).to(tl.int32) + lane
    row = (start // columns).to(tl.int32) + along // columns
    column = along % columns
    block = (row // height).to(tl.int64) * across + column // width
    keep = tl.load(kept + block, mask=start + lane < n, other=0) != 0
    ones = tl.reshape(keep.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bits + byte, tl.sum(ones, axis=1).to(tl.uint8), mask=byte * 8 < n)


def block_sums(tensor: Tensor, height: int, width: int, magnitude: bool) -> Tensor:
    """float64 [blocks] of scores.backend for a contiguous tensor that is not empty."""
    if height == width == 1:
        values = tensor.reshape(-1).double()
        return values.abs_() if magnitude else values
    rows, columns = matrix_of(tensor.shape)
    down, across = triton.cdiv(rows, height), triton.cdiv(columns, width)
    wide = min(triton.next_power_of_2(width), BLOCK)
    high = min(triton.next_power_of_2(height), BLOCK // wide)
    parts_across = triton.cdiv(width, wide)
    parts = triton.cdiv(height, high) * parts_across
    partial = torch.empty(down * across, parts, dtype=torch.float64, device=tensor.device)
    sums_kernel[(partial.numel(),)](
        tensor, partial, rows, columns, height, width, across, parts, parts_across, magnitude, high, wide,
        num_warps=WARPS if high * wide > 1024 else 1,
    )  # fmt: skip
    return partial.sum(1)


def block_bits(kept: Tensor, shape: Sequence[int], height: int, width: int) -> Tensor:
    """uint8 [ceil(n / 8)] of scores.backend; kept: contiguous bool [blocks]."""
    rows, columns = matrix_of(shape)
    bits = torch.empty((rows * columns + 7) // 8, dtype=torch.uint8, device=kept.device)
    grid = (triton.cdiv(rows * columns, BLOCK),)
    across = triton.cdiv(columns, width)
    bits_kernel[grid](
        kept.view(torch.uint8), bits, rows * columns, columns, height, width, across, BLOCK, num_warps=WARPS
    )
    return bits


_SIZES = dict.fromkeys(("rows", "columns", "height", "width", "across", "parts", "parts_across"), "i64")
COMPILE = [
    *(
        KernelBuild(
            f"block_sums_{kind}_{high}x{wide}",
            sums_kernel,
            {"scores": f"*{kind}", "partial": "*fp64", **_SIZES},
            {"MAGNITUDE": True, "DOWN": high, "ACROSS": wide},
            WARPS,
        )
        for kind in TRITON_TYPES.values()
        for high, wide in ((1, 4096), (32, 128))
    ),
    KernelBuild(
        "block_bits",
        bits_kernel,
        {
            "kept": "*u8", "bits": "*u8", "n": "i64", "columns": "i32", "height": "i32", "width": "i32", "across": "i64",
        },
        {"BLOCK": BLOCK},
        WARPS,
    ),
]  # fmt: skip
