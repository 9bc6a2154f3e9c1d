"""The gradient that an Adam step is taken on, and its square sum and finite check over the updated weights.

g = clamp(grad / grad_scale + m ⊙ masked_grad / grad_scale, ±clip_value); the sum is over the lanes that are updated.
Each chunk writes its own partial sum, and one torch sum in a fixed order adds them: no float atomics, so that the same
gradients give the same norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adam.jobs import AdamJob, AdamStep
from .adam_lanes import BITMAP, BLOCK, WARPS, WHOLE, lanes_of
from .adam_math import as_float, clamp
from .adam_plan import BITS, CHUNK, COLUMNS, GRAD_AT, MORE_AT, Plan, Variant, planned


def gradstats_flops(lanes: int) -> float:
    """A square and an addition per lane."""
    return 2.0 * lanes


def gradstats_bytes(lanes: int, grad_size: int) -> float:
    """Each lane's gradient is read, and eight bytes per chunk are written and read again."""
    return float(grad_size * lanes) + 16 * lanes / BLOCK


@triton.jit
def pointer(table, job, column: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the job table. ALIGNED: it is a multiple of 16 bytes (a false promise is a silent error on a GPU)."""
    address = tl.load(table + job * COLUMNS + column).to(tl.pointer_type(kind))
    if ALIGNED:
        # Four values, whatever their size: wider loads of 16-bit values would give them a layout of their own, and each
        # would pass through shared memory to meet the float32 state.
        address = tl.multiple_of(address, kind.primitive_bitwidth // 2)
    return address


@triton.jit
def load_gradient(
    table,
    job,
    first,
    place,
    rank,
    row,
    live,
    grad_scale,
    GRAD: tl.constexpr,
    MORE: tl.constexpr,
    SELECT: tl.constexpr,
    COMPACT_GRADS: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """float32 [BLOCK]: grad + masked_grad, unscaled, not clamped. live None: all lanes are. Other lanes are undefined.

    SELECT: masked_grad counts only where the mask's bits are set. COMPACT_GRADS: masked_grad where there is one, else
    grad, holds kept weights alone: grad the one of lane i at rank + row[i], masked_grad the first of this block at rank.
    """
    g = tl.zeros(place.shape, tl.float32)
    if GRAD is not None:
        if COMPACT_GRADS and MORE is None:
            g = as_float(tl.load(pointer(table, job, GRAD_AT, GRAD, False) + rank + row, mask=live))
        else:
            grad = pointer(table, job, GRAD_AT, GRAD, ALIGNED) + first
            g = as_float(tl.load(grad + place, mask=live))
        if SCALED:
            g = tl.div_rn(g, grad_scale)
    if MORE is not None:
        if COMPACT_GRADS:
            more = pointer(table, job, MORE_AT, MORE, False) + rank
        else:
            more = pointer(table, job, MORE_AT, MORE, ALIGNED) + first
        if SELECT:
            bits = pointer(table, job, BITS, tl.uint8, False) + first // 8
            byte = tl.load(bits + place // 8, mask=live).to(tl.int32)
            chosen = ((byte >> (place % 8)) & 1) != 0
            if COMPACT_GRADS:
                if live is not None:
                    chosen = chosen & live
                one = chosen.to(tl.int32)
                extra = tl.load(more + tl.cumsum(one, 0) - one, mask=chosen)
            elif live is None:
                # A byte of the mask stands for one 32-byte sector of float32: dead sectors are skipped, and eight
                # lanes with one predicate can still be read by wide loads.
                extra = tl.load(more + place, mask=byte != 0)
            else:
                chosen = chosen & live
                extra = tl.load(more + place, mask=chosen)
        else:
            extra = tl.load(more + place, mask=live)
        extra = as_float(extra)
        if SCALED:
            extra = tl.div_rn(extra, grad_scale)
        if SELECT:
            extra = tl.where(chosen, extra, 0.0)
        g = g + extra
    return g


@triton.jit(do_not_specialize=["stride"])
def gradstats_kernel(
    table,
    chunks,
    partial,
    stride,
    grad_scale,
    clip_value,
    LANES: tl.constexpr,
    GRAD: tl.constexpr,
    MORE: tl.constexpr,
    SELECT: tl.constexpr,
    COMPACT_GRADS: tl.constexpr,
    SCALED: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial: float32 [2, stride]; row 0 takes each chunk's square sum, row 1 its number of lanes that are not finite
    before clamping."""
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(chunks + program * CHUNK)
    first = tl.load(chunks + program * CHUNK + 1)
    rank = tl.load(chunks + program * CHUNK + 2)
    count = tl.load(chunks + program * CHUNK + 3).to(tl.int32)
    scale = 1.0
    if SCALED:
        scale = tl.load(grad_scale)
    if LANES == WHOLE:
        first = tl.multiple_of(first, BLOCK)
        place = tl.arange(0, BLOCK)
        live = place < count
        if count == BLOCK:
            g = load_gradient(table, job, first, place, rank, place, None, scale, GRAD, MORE, SELECT, COMPACT_GRADS,
                              SCALED, ALIGNED)  # fmt: skip
        else:
            g = load_gradient(table, job, first, place, rank, place, live, scale, GRAD, MORE, SELECT, COMPACT_GRADS,
                              SCALED, ALIGNED)  # fmt: skip
    else:
        source = pointer(table, job, BITS, tl.uint8 if LANES == BITMAP else tl.uint16, False)
        place, row, live = lanes_of(source, first, rank, count, LANES, BLOCK)
        g = load_gradient(table, job, first, place, rank, row, live, scale, GRAD, MORE, SELECT, COMPACT_GRADS, SCALED,
                          ALIGNED)  # fmt: skip
    g = tl.where(live, g, 0.0)
    endless = (tl.abs(g) < float("inf")) == 0  # NaN compares false
    if CLAMPED:
        g = clamp(g, clip_value)
    tl.store(partial + program, tl.sum(g * g, 0))
    tl.store(partial + stride + program, tl.sum(endless.to(tl.int32), 0).to(tl.float32))


def gradient_arguments(variant: Variant) -> dict[str, Any]:
    """What the kernels are compiled for on the gradient's account."""
    return {
        "LANES": variant.kind,
        "GRAD": variant.grad,
        "MORE": variant.more,
        "SELECT": variant.select,
        "COMPACT_GRADS": variant.compact_grads,
        "ALIGNED": variant.aligned,
        "BLOCK": BLOCK,
    }


def launch(plan: Plan, settings: AdamStep) -> Tensor:
    """See gradstats, of jobs that have been planned."""
    for variant, chunks, offset in plan.launches:
        gradstats_kernel[(chunks.shape[0],)](
            plan.table,
            chunks,
            plan.partial[:, offset:],
            plan.partial.shape[1],
            settings.grad_scale,
            0.0 if settings.clip_value is None else settings.clip_value,
            SCALED=settings.grad_scale is not None,
            CLAMPED=settings.clip_value is not None,
            num_warps=WARPS,
            **gradient_arguments(variant),
        )
    return plan.partial.sum(dim=1, dtype=torch.float64)


def gradstats(jobs: Sequence[AdamJob], settings: AdamStep, cache: dict[Any, Any], alike: bool | None = None) -> Tensor:
    """float64 [2] on the device: the square sum of the gradient over the updated weights of all jobs, unscaled, combined
    and clamped, and how many of its values are NaN or inf before clamping. Nothing waits for the device.

    cache: as for adam.step, to be shared with it. Raises PeckerKernelsError as adam.step does.
    """
    device = jobs[0].param.device if jobs else None
    plan, held = planned(jobs, cache, alike)
    if plan is None:
        return torch.zeros(2, dtype=torch.float64, device=device)
    with torch.cuda.device_of(plan.table):
        found = launch(plan, settings)
    del held
    return found
