"""GroupNorm and SiLU in one, forward and back, channels first or channels last; see norm.group_norm_silu.

A sample is a matrix, [pixels, channels] or [channels, pixels] as it lies in memory, cut into tiles. One launch takes each channel's
moments over the pixels of a tile, one merges them by group, one writes the result; the way back has the same three steps. No float
atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm.cpu import arranged, channels_last
from .registry import KernelBuild
from .table import TRITON_TYPES, on_device_of
from .wgrad import multiple

UNIT = 16  # sizes and addresses (in bytes) that are multiples allow wide accesses
TILE = 4096  # values
WIDEST = 256  # values of a row of a tile
MERGED = 1024  # partial moments that one program takes at once
WARPS = 4


def flops(values: int, backward: bool) -> int:
    """Products, sums, exp and divisions of the formulas. Accounts of an iteration leave them out, as torch does."""
    return (22 if backward else 13) * values


def bytes_moved(values: int, element_size: int, backward: bool) -> int:
    """x is read for the moments and again for the result, which is written; the way back reads the gradient twice too."""
    return (5 if backward else 3) * values * element_size


@triton.jit
def tile_of(rows, columns, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(first value of the sample, offsets [ROWS, COLUMNS] inside it, row [ROWS], column [COLUMNS], which are inside)."""
    columns = multiple(columns, UNIT)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    sample = tl.program_id(0).to(tl.int64) * multiple(rows * columns, UNIT)
    return sample, row[:, None] * columns + column[None, :], row, column, inside


@triton.jit
def by_channel(values, LAST: tl.constexpr):
    """A vector over channels, to be joined with a tile."""
    if LAST:
        spread = values[None, :]
    else:
        spread = values[:, None]
    return spread


@triton.jit
def over_pixels(values, LAST: tl.constexpr):
    """[channels of the tile]: the sum over its pixels."""
    if LAST:
        total = tl.sum(values, axis=0)
    else:
        total = tl.sum(values, axis=1)
    return total


@triton.jit
def channels_of(row, column, rows, columns, LAST: tl.constexpr):
    """(channel, which exist, their number, split: which stretch of pixels this is, its pixels that exist)."""
    if LAST:
        channel, channels, first, pixels = column, columns, tl.program_id(1) * row.shape[0], rows
        left = tl.minimum(pixels - first, row.shape[0])
        split = tl.program_id(1)
    else:
        channel, channels, first, pixels = row, rows, tl.program_id(2) * column.shape[0], columns
        left = tl.minimum(pixels - first, column.shape[0])
        split = tl.program_id(2)
    return channel, channel < channels, channels, split, left


@triton.jit
def moments_kernel(
    x, partial, rows: tl.int32, columns: tl.int32, splits: tl.int32,
    LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial[0 or 1, sample, split, channel] = mean, and squares around it, over the pixels of a tile."""
    sample, at, row, column, inside = tile_of(rows, columns, UNIT, ROWS, COLUMNS)
    channel, exists, channels, split, left = channels_of(row, column, rows, columns, LAST)
    value = tl.load(x + sample + at, mask=inside, other=0).to(tl.float32)
    mean = over_pixels(value, LAST) / left
    off = tl.where(inside, value - by_channel(mean, LAST), 0.0)
    here = (tl.program_id(0).to(tl.int64) * splits + split) * channels + channel
    tl.store(partial + here, mean, mask=exists)
    tl.store(
        partial + tl.num_programs(0).to(tl.int64) * splits * channels + here, over_pixels(off * off, LAST), mask=exists
    )


@triton.jit
def merge_kernel(
    partial, mean, rstd, channels: tl.int32, pixels: tl.int32, splits: tl.int32, size: tl.int32, groups: tl.int32, eps,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """mean and rstd of each sample and group from its channels' moments. SPAN: pixels of a tile. size: channels of a group."""
    sample, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    count = (size * pixels).to(tl.float32)
    squares = partial + (tl.num_programs(0) // groups).to(tl.int64) * splits * channels
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(STEPS):
        entry = i * BLOCK + tl.arange(0, BLOCK)
        inside = entry < splits * size
        split = entry // size
        at = (sample * splits + split) * channels + group * size + entry % size
        total += tl.load(partial + at, mask=inside, other=0) * tl.minimum(pixels - split * SPAN, SPAN).to(tl.float32)
    centre = tl.sum(total) / count
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(STEPS):
        entry = i * BLOCK + tl.arange(0, BLOCK)
        inside = entry < splits * size
        split = entry // size
        at = (sample * splits + split) * channels + group * size + entry % size
        off = tl.load(partial + at, mask=inside, other=0) - centre
        between = tl.where(inside, off * off * tl.minimum(pixels - split * SPAN, SPAN).to(tl.float32), 0.0)
        total += tl.load(squares + at, mask=inside, other=0) + between
    tl.store(mean + tl.program_id(0), centre)
    tl.store(rstd + tl.program_id(0), tl.div_rn(1.0, tl.sqrt_rn(tl.sum(total) / count + eps)))


@triton.jit
def constants(mean, rstd, weight, bias, channel, exists, size, groups, LAST: tl.constexpr):
    """(mean, rstd, weight, bias) of the tile's channels, each to be joined with it."""
    group = tl.program_id(0).to(tl.int64) * groups + channel // size
    centre = by_channel(tl.load(mean + group, mask=exists, other=0), LAST)
    scale = by_channel(tl.load(rstd + group, mask=exists, other=0), LAST)
    w = by_channel(tl.load(weight + channel, mask=exists, other=0).to(tl.float32), LAST)
    b = by_channel(tl.load(bias + channel, mask=exists, other=0).to(tl.float32), LAST)
    return centre, scale, w, b


@triton.jit
def forward_kernel(
    x, y, mean, rstd, weight, bias, rows: tl.int32, columns: tl.int32, size: tl.int32, groups: tl.int32,
    SILU: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = u / (1 + exp(−u)), u = (x − mean) · rstd · weight + bias."""
    sample, at, row, column, inside = tile_of(rows, columns, UNIT, ROWS, COLUMNS)
    channel, exists, _, _, _ = channels_of(row, column, rows, columns, LAST)
    centre, scale, w, b = constants(mean, rstd, weight, bias, channel, exists, size, groups, LAST)
    u = (tl.load(x + sample + at, mask=inside, other=0).to(tl.float32) - centre) * scale * w + b
    if SILU:
        u = u / (1.0 + tl.exp(-u))
    tl.store(y + sample + at, u.to(y.dtype.element_ty), mask=inside)


@triton.jit
def inner_gradient(grad, u, SILU: tl.constexpr):
    """du of the gradient of y."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-u))
        grad = grad * (s * (1.0 + u * (1.0 - s)))
    return grad


@triton.jit
def sums_kernel(
    grad, x, partial, mean, rstd, weight, bias, rows: tl.int32, columns: tl.int32, splits: tl.int32,
    size: tl.int32, groups: tl.int32,
    SILU: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial[0 or 1, sample, split, channel] = Σ du, Σ du · xhat over the pixels of a tile."""
    sample, at, row, column, inside = tile_of(rows, columns, UNIT, ROWS, COLUMNS)
    channel, exists, channels, split, _ = channels_of(row, column, rows, columns, LAST)
    centre, scale, w, b = constants(mean, rstd, weight, bias, channel, exists, size, groups, LAST)
    xhat = (tl.load(x + sample + at, mask=inside, other=0).to(tl.float32) - centre) * scale
    du = inner_gradient(tl.load(grad + sample + at, mask=inside, other=0).to(tl.float32), xhat * w + b, SILU)
    here = (tl.program_id(0).to(tl.int64) * splits + split) * channels + channel
    tl.store(partial + here, over_pixels(du, LAST), mask=exists)
    tl.store(
        partial + tl.num_programs(0).to(tl.int64) * splits * channels + here, over_pixels(du * xhat, LAST), mask=exists
    )


@triton.jit
def means_kernel(
    partial, weight, means, channels: tl.int32, pixels: tl.int32, splits: tl.int32, size: tl.int32, groups: tl.int32,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """means[0 or 1, sample, group] = the group's mean of weight · du, and of weight · du · xhat."""
    sample, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    count = (size * pixels).to(tl.float32)
    other = partial + (tl.num_programs(0) // groups).to(tl.int64) * splits * channels
    one, two = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(STEPS):
        entry = i * BLOCK + tl.arange(0, BLOCK)
        inside = entry < splits * size
        channel = group * size + entry % size
        at = (sample * splits + entry // size) * channels + channel
        w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
        one += w * tl.load(partial + at, mask=inside, other=0)
        two += w * tl.load(other + at, mask=inside, other=0)
    tl.store(means + tl.program_id(0), tl.sum(one) / count)
    tl.store(means + tl.num_programs(0) + tl.program_id(0), tl.sum(two) / count)


@triton.jit
def backward_kernel(
    grad, x, grad_x, mean, rstd, weight, bias, means, rows: tl.int32, columns: tl.int32, size: tl.int32, groups: tl.int32,
    SILU: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x = rstd · (weight · du − mean of weight · du − xhat · mean of weight · du · xhat), means over the group."""
    sample, at, row, column, inside = tile_of(rows, columns, UNIT, ROWS, COLUMNS)
    channel, exists, _, _, _ = channels_of(row, column, rows, columns, LAST)
    centre, scale, w, b = constants(mean, rstd, weight, bias, channel, exists, size, groups, LAST)
    group = tl.program_id(0).to(tl.int64) * groups + channel // size
    one = by_channel(tl.load(means + group, mask=exists, other=0), LAST)
    two = by_channel(tl.load(means + tl.num_programs(0).to(tl.int64) * groups + group, mask=exists, other=0), LAST)
    xhat = (tl.load(x + sample + at, mask=inside, other=0).to(tl.float32) - centre) * scale
    du = inner_gradient(tl.load(grad + sample + at, mask=inside, other=0).to(tl.float32), xhat * w + b, SILU)
    tl.store(grad_x + sample + at, (scale * (w * du - one - xhat * two)).to(grad_x.dtype.element_ty), mask=inside)


class Layout:
    """How a sample is cut: a matrix of rows × columns in tiles; splits stretches of `span` pixels each."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.last = channels_last(x)
        self.n, self.channels = x.shape[:2]
        self.pixels = x.numel() // (self.n * self.channels)
        self.groups, self.size = groups, self.channels // groups
        self.rows, self.columns = (self.pixels, self.channels) if self.last else (self.channels, self.pixels)
        self.tile = tile(self.rows, self.columns)
        blocks = [triton.cdiv(length, side) for length, side in zip((self.rows, self.columns), self.tile)]
        self.grid = (self.n, *blocks)
        self.splits, self.span = (blocks[0], self.tile[0]) if self.last else (blocks[1], self.tile[1])
        self.merged = min(MERGED, triton.next_power_of_2(self.splits * self.size))
        self.steps = triton.cdiv(self.splits * self.size, self.merged)

    def partial(self, x: Tensor) -> Tensor:
        return torch.empty(2, self.n, self.splits, self.channels, dtype=torch.float32, device=x.device)

    def unit(self, *tensors: Tensor) -> int:
        sizes = (self.columns, *(t.data_ptr() for t in tensors))
        return UNIT if all(size % UNIT == 0 for size in sizes) else 1


def tile(rows: int, columns: int) -> tuple[int, int]:
    """Sides of a tile, powers of two."""
    wide = min(WIDEST, TILE, triton.next_power_of_2(columns))
    return min(TILE // wide, triton.next_power_of_2(rows)), wide


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [N, groups], rstd [N, groups])."""
    x = arranged(x, channels_last(x))
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if not x.numel():
        return y, mean, rstd
    cut = Layout(x, groups)
    partial, unit = cut.partial(x), cut.unit(x, y)
    weight, bias = weight.contiguous(), bias.contiguous()
    with on_device_of([x]):
        moments_kernel[cut.grid](
            x, partial, cut.rows, cut.columns, cut.splits, cut.last, unit, *cut.tile, num_warps=WARPS
        )
        merge_kernel[(cut.n * groups,)](
            partial, mean, rstd, cut.channels, cut.pixels, cut.splits, cut.size, groups, eps,
            cut.span, cut.merged, cut.steps, num_warps=WARPS,
        )  # fmt: skip
        forward_kernel[cut.grid](
            x, y, mean, rstd, weight, bias, cut.rows, cut.columns, cut.size, groups, silu, cut.last, unit, *cut.tile,
            num_warps=WARPS,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias, those that are needed."""
    last = channels_last(x)
    grad, x, weight, bias = arranged(grad, last), arranged(x, last), weight.contiguous(), bias.contiguous()
    if not x.numel():
        zero = torch.zeros_like(weight), torch.zeros_like(bias)
        return torch.empty_like(x) if needs_x else None, *(zero if needs_weight else (None, None))
    cut = Layout(x, groups)
    partial, grad_x = cut.partial(x), torch.empty_like(x) if needs_x else None
    shared = (mean, rstd, weight, bias)
    with on_device_of([x]):
        sums_kernel[cut.grid](
            grad, x, partial, *shared, cut.rows, cut.columns, cut.splits, cut.size, groups,
            silu, cut.last, cut.unit(grad, x), *cut.tile, num_warps=WARPS,
        )  # fmt: skip
        if grad_x is not None:
            means = torch.empty(2, cut.n, groups, dtype=torch.float32, device=x.device)
            means_kernel[(cut.n * groups,)](
                partial, weight, means, cut.channels, cut.pixels, cut.splits, cut.size, groups, cut.merged, cut.steps,
                num_warps=WARPS,
            )  # fmt: skip
            backward_kernel[cut.grid](
                grad, x, grad_x, *shared, means, cut.rows, cut.columns, cut.size, groups,
                silu, cut.last, cut.unit(grad, x, grad_x), *cut.tile, num_warps=WARPS,
            )  # fmt: skip
    if not needs_weight:
        return grad_x, None, None
    of_bias, of_weight = partial.sum((1, 2))
    return grad_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype)


def _builds() -> list[KernelBuild]:
    found = []
    sides = {"ROWS": TILE // WIDEST, "COLUMNS": WIDEST}
    counts = dict.fromkeys(("rows", "columns", "splits", "size", "groups", "channels", "pixels"), "i32")
    for kind in TRITON_TYPES.values():
        image, part, vector = f"*{kind}", "*fp32", f"*{kind}"
        pointers = {
            "x": image, "y": image, "grad": image, "grad_x": image, "weight": vector, "bias": vector,
            "partial": part, "mean": part, "rstd": part, "means": part, "eps": "fp32", **counts,
        }  # fmt: skip
        for last in (True, False):
            for kernel in (moments_kernel, forward_kernel, sums_kernel, backward_kernel):
                names = list(kernel.arg_names)
                constexpr = {"LAST": last, "UNIT": UNIT, **sides, **({"SILU": True} if "SILU" in names else {})}
                signature = {name: pointers[name] for name in names if name in pointers}
                stores = 64 if kernel in (forward_kernel, backward_kernel) else 0
                label = f"norm_{kernel.__name__.removesuffix('_kernel')}_{kind}_{'last' if last else 'first'}"
                found.append(KernelBuild(label, kernel, signature, constexpr, WARPS, 64, stores))
        for kernel, more in ((merge_kernel, {"SPAN": 16}), (means_kernel, {})):
            if kernel is merge_kernel and kind != TRITON_TYPES[torch.float32]:
                continue
            signature = {name: pointers[name] for name in kernel.arg_names if name in pointers}
            constexpr = {**more, "BLOCK": MERGED, "STEPS": 2}
            label = f"norm_{kernel.__name__.removesuffix('_kernel')}_{kind}"
            found.append(KernelBuild(label, kernel, signature, constexpr, WARPS))
    return found


COMPILE = _builds()
