"""The weight gradient of live tiles in one launch: for each tile Σₖ grad_out[k, rows] ⊗ x[k, columns], a product over all k.

A tile is worked on in BLOCK_M x BLOCK_N parts with float32 sums. Few tiles leave processors idle: k is then split,
partial sums go to a float32 workspace and are added in order, so that results repeat to the bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..errors import PeckerKernelsError
from .registry import KernelBuild
from .table import TRITON_TYPES, on_device_of

UNIT = 16  # sizes and addresses (in bytes) that are multiples allow wide accesses
SMALLEST = 16  # side of a tile that a matrix unit takes
SPLITS = 16  # at most
DEPTH = 512  # values of k that are worth a split
ADD_BLOCK = 1024
ADD_WARPS = 4


class Blocks(NamedTuple):
    """Part of a tile that a program computes, k per step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def flops(k: int, lanes: int) -> int:
    """A multiplication and an addition for each lane and position."""
    return 2 * k * lanes


def bytes_moved(k: int, tiles: int, height: int, width: int, lanes: int, element_size: int) -> int:
    """Each tile reads its rows and columns once, from a cache where neighbours share them; lanes are written once."""
    return element_size * (tiles * k * (height + width) + lanes)


@triton.jit
def multiple(value, of: tl.constexpr):
    """The same value, for one that is a multiple; tl.multiple_of is lost on arguments that are not specialised."""
    return value // of * of


@triton.jit(do_not_specialize=["k_end", "rows", "columns", "stride_g", "stride_x", "depth", "across", "parts", "lanes"])
def tiles_kernel(
    grad_out, x, tiles, out, k_end: tl.int32, rows: tl.int32, columns: tl.int32,
    stride_g: tl.int64, stride_x: tl.int64, depth: tl.int32, across: tl.int32, parts: tl.int32, lanes: tl.int64,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """out[split * lanes + lane] = the sum over k in [split * depth, (split + 1) * depth). STEPS: depth / BLOCK_K for the
    interpreter, whose loops end at Python numbers; None leaves it open."""
    tile, part, split = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    entry = tiles + 4 * tile.to(tl.int64)
    # Multiples of UNIT all of them, as the compiler can see: else values would be read one by one.
    top, left = multiple(tl.load(entry).to(tl.int32), UNIT), multiple(tl.load(entry + 1).to(tl.int32), UNIT)
    bottom = multiple(tl.minimum(top + HEIGHT, rows), UNIT)
    right = multiple(tl.minimum(left + WIDTH, columns), UNIT)
    stride_g, stride_x = multiple(stride_g, UNIT), multiple(stride_x, UNIT)
    down, along = (part // across) * BLOCK_M, (part % across) * BLOCK_N
    row, column = top + down + tl.arange(0, BLOCK_M), left + along + tl.arange(0, BLOCK_N)
    row_in, column_in = (row < bottom)[None, :], (column < right)[None, :]
    first = split * depth
    last = tl.minimum(first + depth, k_end)
    step = tl.arange(0, BLOCK_K)
    k = (first + step).to(tl.int64)[:, None]
    from_g, from_x = grad_out + k * stride_g + row[None, :], x + k * stride_x + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i in range(0, tl.cdiv(last - first, BLOCK_K) if STEPS is None else STEPS):
        inside = (first + i * BLOCK_K + step < last)[:, None]
        g = tl.load(from_g, mask=inside & row_in, other=0)
        value = tl.load(from_x, mask=inside & column_in, other=0)
        if STEPS is not None:  # the interpreter multiplies bfloat16 as integers; as float32 the products are exact
            g, value = g.to(tl.float32), value.to(tl.float32)
        total = tl.dot(tl.trans(g), value, total, input_precision=PRECISION)
        from_g += BLOCK_K * stride_g
        from_x += BLOCK_K * stride_x
    lane, wide = multiple(split * lanes + tl.load(entry + 2), UNIT), multiple(tl.load(entry + 3), UNIT)
    here = lane + (row - top).to(tl.int64)[:, None] * wide + (column - left)[None, :]
    tl.store(out + here, total.to(out.dtype.element_ty), mask=(row < bottom)[:, None] & column_in)


@triton.jit(do_not_specialize=["lanes"])
def add_kernel(partial, out, lanes: tl.int64, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[lane] = partial[0, lane] + partial[1, lane] + … in this order; lanes: of a row, a multiple of BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lanes = multiple(lanes, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * lanes + at)
    tl.store(out + at, total.to(out.dtype.element_ty))


def precision() -> str:
    """What torch's own float32 products are made with: "ieee" unless TF32 is allowed."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def blocks(dtype: torch.dtype, tile: tuple[int, int], how: str, aligned: bool) -> Blocks:
    """No side is larger than the tile's, rounded down to a power of two; values read one by one take registers."""
    m, n = (1 << (min(128, side).bit_length() - 1) for side in tile)
    if not aligned or (dtype == torch.float32 and how == "ieee"):
        m, n = min(m, 64), min(n, 64)
    if dtype == torch.float32 and how == "ieee":
        return Blocks(m, n, 16, 8 if m * n > 1024 else 2, 3)
    warps = 8 if m * n > 8192 else 4
    return Blocks(m, n, 32 if dtype == torch.float32 else 64, warps, 3)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits_of(programs: int, k: int, processors: int) -> int:
    """Enough for two programs a processor, each with DEPTH values of k or more."""
    return max(1, min(2 * processors // max(programs, 1), k // DEPTH, SPLITS))


def tile_weight_grad(
    grad_out: Tensor, x: Tensor, tiles: Tensor, count: int, height: int, width: int, splits: int | None = None
) -> Tensor:
    """See ops_wgrad.tile_weight_grad; splits: of k, None = as many as the device can use.

    Raises PeckerKernelsError for tiles below 16x16 and dtypes other than float32, bfloat16 and float16.
    """
    if min(height, width) < SMALLEST:
        raise PeckerKernelsError(f"impl='triton' takes tiles from {SMALLEST}x{SMALLEST} on, got {height}x{width}")
    if x.dtype not in TRITON_TYPES:
        raise PeckerKernelsError(f"impl='triton' takes float32, bfloat16 and float16, got {x.dtype}")
    (k, rows), columns = grad_out.shape, x.shape[1]
    if count == 0 or k == 0:
        return torch.zeros(count, dtype=x.dtype, device=x.device)
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (grad_out, x))
    how = precision()
    sizes = (height, width, rows, columns, g.stride(0), x.stride(0), g.data_ptr(), x.data_ptr())
    aligned = all(size % UNIT == 0 for size in sizes)
    block = blocks(x.dtype, (height, width), how, aligned)
    across = triton.cdiv(width, block.n)
    parts = triton.cdiv(height, block.m) * across
    tiles = tiles.contiguous()
    programs = tiles.shape[0] * parts
    if splits is None:
        splits = splits_of(programs, k, _processors(x.device))
    depth = triton.cdiv(triton.cdiv(k, splits), block.k) * block.k
    splits = triton.cdiv(k, depth)
    # A row of partial sums fills whole blocks of the addition; out is cut to size behind it.
    padded = triton.cdiv(count, ADD_BLOCK) * ADD_BLOCK
    out = torch.empty(padded if splits > 1 else count, dtype=x.dtype, device=x.device)
    target = out if splits == 1 else torch.empty(splits * padded, dtype=torch.float32, device=x.device)
    with on_device_of([x]):
        tiles_kernel[(programs, splits)](
            g, x, tiles, target, k, rows, columns, g.stride(0), x.stride(0), depth, across, parts, padded,
            height, width, UNIT if aligned else 1, how, *block[:3],
            depth // block.k if interpreted() else None, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        if splits > 1:
            add_kernel[(padded // ADD_BLOCK,)](target, out, padded, splits, ADD_BLOCK, num_warps=ADD_WARPS)
    return out if splits == 1 else out[:count].clone()


def _build(name: str, kind: tl.dtype, dtype: torch.dtype, side: int, how: str, aligned: bool) -> KernelBuild:
    block = blocks(dtype, (side, side), how, aligned)
    return KernelBuild(
        f"wgrad_tiles_{name}",
        tiles_kernel,
        {
            "grad_out": f"*{kind}", "x": f"*{kind}", "tiles": "*i64", "out": f"*{kind}",
            **dict.fromkeys(("k_end", "rows", "columns", "depth", "across", "parts"), "i32"),
            **dict.fromkeys(("stride_g", "stride_x", "lanes"), "i64"),
        },
        {
            "HEIGHT": side, "WIDTH": side, "UNIT": UNIT if aligned else 1, "PRECISION": how,
            "BLOCK_M": block.m, "BLOCK_N": block.n, "BLOCK_K": block.k, "STEPS": None,
        },
        block.warps,
        (64 if how == "tf32" else 128) if aligned else 0,
        unaligned=() if aligned else ("grad_out", "x"),
        options={"num_stages": block.stages},
    )  # fmt: skip


COMPILE = [
    *(
        _build(f"{kind}_{how}_{side}" + ("" if aligned else "_unaligned"), kind, dtype, side, how, aligned)
        for dtype, kind in TRITON_TYPES.items()
        for how in (("ieee", "tf32") if dtype == torch.float32 else ("ieee",))
        for side, aligned in ((128, True), (64, True), (16, True), (128, False))
    ),
    *(
        KernelBuild(
            f"wgrad_add_{kind}",
            add_kernel,
            {"partial": "*fp32", "out": f"*{kind}", "lanes": "i64"},
            {"SPLITS": SPLITS, "BLOCK": ADD_BLOCK},
            ADD_WARPS,
            128,
            64,
        )
        for kind in TRITON_TYPES.values()
    ),
]
