"""The masked Adam step in Triton: one launch over all tensors of one kind, nothing read on the host.

m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p - lr/(1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps)      (Kingma & Ba, 1412.6980)

The factors of a step come from adam_prepare; the formula is reference.adam_, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..adam.jobs import AdamJob, AdamStep
from ..errors import PeckerKernelsError
from .adam_lanes import BITMAP, WARPS, WHOLE, lanes_of
from .adam_math import as_float, clamp, float32, fma, lerp, load_root, nearest_bf16, random_bits16, round_bf16
from .adam_plan import (
    BITS,
    CHUNK,
    COLUMNS,
    EMA_AT,
    EXP_AVG_AT,
    EXP_AVG_SQ_AT,
    FIRST_INDEX,
    MASTER_AT,
    PARAM_AT,
    SCALARS,
    Variant,
    planned,
)
from .adam_prepare import prepare
from .gradstats import gradient_arguments, load_gradient, pointer


@triton.jit
def update(
    table,
    scalars,
    job,
    first,
    place,
    state_first,
    state_row,
    rank,
    row,
    live,
    weight1,
    weight2,
    beta2,
    eps,
    weight_decay,
    clip_value,
    ema_weight,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MORE: tl.constexpr,
    SELECT: tl.constexpr,
    COMPACT_GRADS: tl.constexpr,
    SCALED: tl.constexpr,
    CLAMPED: tl.constexpr,
    CLIPPED: tl.constexpr,
    L2: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EXP_AVG: tl.constexpr,
    MASTER: tl.constexpr,
    EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block of weights at first + place, their state at state_first + state_row; live None: all lanes are.

    rank, row: where compact gradients lie, see load_gradient.
    weight1, weight2, ema_weight: 1-β₁, 1-β₂ and 1-decay, because 1 - float32(.999) has lost five digits.
    """
    mine = scalars + job * SCALARS
    param = pointer(table, job, PARAM_AT, PARAM, ALIGNED) + first
    exp_avg_sq = pointer(table, job, EXP_AVG_SQ_AT, tl.float32, ALIGNED) + state_first
    g = load_gradient(table, job, first, place, rank, row, live, tl.load(mine + 4), GRAD, MORE, SELECT, COMPACT_GRADS,
                      SCALED, ALIGNED)  # fmt: skip
    v = load_root(exp_avg_sq + state_row, live)
    if MASTER:
        master = pointer(table, job, MASTER_AT, tl.float32, ALIGNED) + state_first
        p = tl.load(master + state_row, mask=live)
    else:
        p = as_float(tl.load(param + place, mask=live))
    if CLAMPED:
        g = clamp(g, clip_value)
    if CLIPPED:
        g = g * tl.load(mine + 3)
    if DECOUPLED:
        p = p * tl.load(mine + 2)
    if L2:
        g = fma(float32(weight_decay), p, g)
    m = g
    if EXP_AVG:
        exp_avg = pointer(table, job, EXP_AVG_AT, tl.float32, ALIGNED) + state_first
        m = lerp(tl.load(exp_avg + state_row, mask=live), g, float32(weight1))
        tl.store(exp_avg + state_row, m, mask=live)
    v = fma(weight2 * g, g, v * beta2)
    tl.store(exp_avg_sq + state_row, v, mask=live)
    # Division and root are the correctly rounded ones: the approximate ones would use up the tolerance.
    p = fma(-tl.load(mine), tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.load(mine + 1)) + eps), p)
    if MASTER:
        tl.store(master + state_row, p, mask=live)
    if PARAM.primitive_bitwidth == 16 and PARAM.is_int():  # bfloat16
        if MASTER:
            stored = nearest_bf16(p)
        else:
            key = tl.load((mine + 6).to(tl.pointer_type(tl.uint32), bitcast=True))
            index = tl.load(table + job * COLUMNS + FIRST_INDEX) + first
            stored = round_bf16(p, random_bits16(index, place, key))
    else:
        stored = p.to(PARAM)
    tl.store(param + place, stored, mask=live)
    if EMA:
        ema = pointer(table, job, EMA_AT, tl.float32, ALIGNED) + state_first
        if not MASTER:
            p = as_float(stored)
        tl.store(ema + state_row, lerp(tl.load(ema + state_row, mask=live), p, float32(ema_weight)), mask=live)


@triton.jit
def adam_kernel(
    table,
    chunks,
    scalars,
    weight1,
    weight2,
    beta2,
    eps,
    weight_decay,
    clip_value,
    ema_weight,
    LANES: tl.constexpr,
    COMPACT: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MORE: tl.constexpr,
    SELECT: tl.constexpr,
    COMPACT_GRADS: tl.constexpr,
    SCALED: tl.constexpr,
    CLAMPED: tl.constexpr,
    CLIPPED: tl.constexpr,
    L2: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EXP_AVG: tl.constexpr,
    MASTER: tl.constexpr,
    EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk per program. Addresses are int64 sums of scalars; what differs between lanes fits in int32."""
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(chunks + program * CHUNK)
    first = tl.load(chunks + program * CHUNK + 1)
    rank = tl.load(chunks + program * CHUNK + 2)
    count = tl.load(chunks + program * CHUNK + 3).to(tl.int32)
    if tl.load(scalars + job * SCALARS + 5) == 0:
        if LANES == WHOLE:
            first = tl.multiple_of(first, BLOCK)
            place = tl.arange(0, BLOCK)
            # Full blocks apart: a mask on the addresses of a ragged end would forbid wide accesses.
            if count == BLOCK:
                update(table, scalars, job, first, place, first, place, rank, place, None, weight1, weight2, beta2,
                       eps, weight_decay, clip_value, ema_weight, PARAM, GRAD, MORE, SELECT, COMPACT_GRADS, SCALED,
                       CLAMPED, CLIPPED, L2, DECOUPLED, EXP_AVG, MASTER, EMA, ALIGNED)  # fmt: skip
            else:
                update(table, scalars, job, first, place, first, place, rank, place, place < count, weight1, weight2,
                       beta2, eps, weight_decay, clip_value, ema_weight, PARAM, GRAD, MORE, SELECT, COMPACT_GRADS,
                       SCALED, CLAMPED, CLIPPED, L2, DECOUPLED, EXP_AVG, MASTER, EMA, ALIGNED)  # fmt: skip
        else:
            source = pointer(table, job, BITS, tl.uint8 if LANES == BITMAP else tl.uint16, False)
            place, row, live = lanes_of(source, first, rank, count, LANES, BLOCK)
            state_first = rank if COMPACT else first
            state_row = row if COMPACT else place
            update(table, scalars, job, first, place, state_first, state_row, rank, row, live, weight1, weight2, beta2,
                   eps, weight_decay, clip_value, ema_weight, PARAM, GRAD, MORE, SELECT, COMPACT_GRADS, SCALED, CLAMPED,
                   CLIPPED, L2, DECOUPLED, EXP_AVG, MASTER, EMA, ALIGNED)  # fmt: skip


def compile_arguments(variant: Variant, settings: AdamStep) -> dict[str, Any]:
    """The constexpr arguments of adam_kernel."""
    return {
        **gradient_arguments(variant),
        "COMPACT": variant.compact,
        "PARAM": variant.param,
        "SCALED": settings.grad_scale is not None,
        "CLAMPED": settings.clip_value is not None,
        "CLIPPED": settings.clip_norm is not None,
        "L2": settings.weight_decay != 0 and not settings.decoupled_weight_decay,
        "DECOUPLED": settings.weight_decay != 0 and settings.decoupled_weight_decay,
        "EXP_AVG": variant.exp_avg,
        "MASTER": variant.master,
        "EMA": variant.ema and settings.ema is not None,
    }


def step(jobs: Sequence[AdamJob], settings: AdamStep, cache: dict[Any, Any], alike: bool | None = None) -> None:
    """Carry out one Adam step; see adam.jobs for the terms and reference.adam_ for the formula.

    cache: an empty dict to begin with, kept by the caller between steps; it holds device tables and references to the
    tensors they point into. Waits for the device only where a mask is new, and can be captured in a CUDA graph after
    one step outside it. alike: nothing but the addresses of gradients can have changed since the last call. Raises
    PeckerKernelsError for float64 weights, for masked weights that are not contiguous and for other dtypes, devices and
    layouts that the kernels do not serve, before anything is written.
    """
    if settings.beta1 != 0 and any(job.exp_avg is None for job in jobs):
        raise PeckerKernelsError("exp_avg may be missing only where beta1 is 0")
    plan, held = planned(jobs, cache, alike)
    if plan is None:
        return
    with torch.cuda.device_of(plan.table):
        prepare(plan, settings)
        for variant, chunks, _ in plan.launches:
            adam_kernel[(chunks.shape[0],)](
                plan.table,
                chunks,
                plan.scalars,
                1 - settings.beta1,
                1 - settings.beta2,
                settings.beta2,
                settings.eps,
                settings.weight_decay,
                settings.clip_value if settings.clip_value is not None else 0.0,
                1 - settings.ema if settings.ema is not None else 0.0,
                num_warps=WARPS,
                **compile_arguments(variant, settings),
            )
    del held
    # The kernels wrote behind autograd's back.
    torch.autograd.graph.increment_version([job.param for job in plan.jobs])


def adam_flops(lanes: int, exp_avg: bool = True, weight_decay: bool = False) -> float:
    """exp_avg_sq 4 (two products, a fused product and sum), exp_avg 3, weight 6 (root, two quotients, eps, a fused
    product and sum counted as two), decay 2; per weight that is updated."""
    return lanes * (4.0 + 3 * exp_avg + 6 + 2 * weight_decay)


def adam_bytes(
    n: int,
    lanes: int | None = None,
    kind: str = "whole",
    *,
    param_size: int = 4,
    grad_size: int = 4,
    compact: bool = True,
    exp_avg: bool = True,
    master: bool = False,
    ema: bool = False,
    compact_grad: bool = False,
) -> float:
    """Bytes moved by a step over `lanes` of n weights that lie at random, in sectors of 32 bytes; kind: "whole", "bitmap"
    or "index". Weights and state are read and written, the gradient is read (of the kept weights alone where it is
    compact), master weights stand in for the read of the weights."""
    lanes = n if lanes is None else lanes

    def touched(size: int) -> float:
        return n * size * (1 - (1 - lanes / n) ** (32 / size)) if n else 0.0

    state = 4 * 2 * (1 + exp_avg + master + ema)
    mask = {"whole": 0.0, "bitmap": n / 8, "index": 2.0 * lanes}[kind]
    state_bytes = state * (lanes if compact or kind == "whole" else touched(4) / 4)
    grad_bytes = grad_size * lanes if compact_grad else touched(grad_size)
    return (1 if master else 2) * touched(param_size) + grad_bytes + state_bytes + mask
