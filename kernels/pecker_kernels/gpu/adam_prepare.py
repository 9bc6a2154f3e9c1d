"""What one Adam step multiplies the weights of a tensor by: computed once per tensor, on the device.

In float64: 1-β₂ᵗ in float32 has lost five digits at β₂ = .999, t = 1, and one division per tensor costs nothing where one
per weight would halve the rate of a GPU without fast float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adam.jobs import AdamStep
from ..errors import PeckerKernelsError
from . import gradstats
from .adam_math import random_key
from .adam_plan import COLUMNS, SCALARS, STEP_AT, Plan


@triton.jit(do_not_specialize=["seed"])
def prepare_kernel(
    table,
    scalars,
    lr,
    lr_rest,
    lr_tensor,
    weight_decay,
    found_inf,
    grad_scale,
    square_sum,
    clip_norm,
    seed: tl.int64,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
):
    """float32 [J, 8] scalars: lr / (1-β₁ᵗ), √(1-β₂ᵗ), 1 - lr·wd, clip factor, grad_scale, skip, key of the random
    bits.

    lr + lr_rest is the float64 learning rate, unless lr_tensor is given; LOG_BETA1 None: β₁ = 0.
    """
    job = tl.program_id(0).to(tl.int64)
    step = tl.load(tl.load(table + job * COLUMNS + STEP_AT).to(tl.pointer_type(tl.float32)))
    if lr_tensor is None:
        rate = tl.full((), 0.0, tl.float64) + lr + lr_rest
    else:
        rate = tl.load(lr_tensor).to(tl.float64)
    t = step.to(tl.float64)
    correction1 = tl.full((), 1.0, tl.float64)
    if LOG_BETA1 is not None:
        correction1 -= tl.exp(t * LOG_BETA1)
    correction2 = 1.0 - tl.exp(t * LOG_BETA2)
    factor = tl.full((), 1.0, tl.float64)
    if square_sum is not None:
        factor = clip_norm / (tl.sqrt(tl.load(square_sum)) + 1e-6)
        factor = tl.where(factor > 1.0, 1.0, factor)  # NaN stays NaN
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    skip = 0.0
    if found_inf is not None:
        skip = (tl.load(found_inf) != 0).to(tl.float32)
    wide_seed = tl.full((), 0, tl.int64) + seed

    out = scalars + job * SCALARS
    tl.store(out, (rate / correction1).to(tl.float32))
    tl.store(out + 1, tl.sqrt(correction2).to(tl.float32))
    tl.store(out + 2, (1.0 - rate * weight_decay).to(tl.float32))
    tl.store(out + 3, factor.to(tl.float32))
    tl.store(out + 4, scale)
    tl.store(out + 5, skip)
    tl.store((out + 6).to(tl.pointer_type(tl.uint32), bitcast=True), random_key(wide_seed, step))


def _device_scalar(value: Tensor | None, device: torch.device, name: str) -> Tensor | None:
    if value is not None and (value.device != device or value.dtype != torch.float32 or value.numel() != 1):
        raise PeckerKernelsError(
            f"{name} must be one float32 value on {device}, got {value.dtype} {list(value.shape)} on {value.device}"
        )
    return value


def prepare(plan: Plan, settings: AdamStep) -> None:
    """Fill plan.scalars. Raises PeckerKernelsError for a found_inf or grad_scale of another dtype or device."""
    device = plan.table.device
    found_inf = _device_scalar(settings.found_inf, device, "found_inf")
    grad_scale = _device_scalar(settings.grad_scale, device, "grad_scale")
    lr = settings.lr
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and device.type != "cpu":
        lr = float(lr)  # no device to wait for
    rate = 0.0 if isinstance(lr, Tensor) else lr
    rate_float32 = float(torch.tensor(rate, dtype=torch.float32))
    square_sum = gradstats.launch(plan, settings) if settings.clip_norm is not None else None
    prepare_kernel[(plan.table.shape[0],)](
        plan.table,
        plan.scalars,
        rate_float32,
        rate - rate_float32,
        lr if isinstance(lr, Tensor) else None,
        settings.weight_decay,
        found_inf,
        grad_scale,
        square_sum,
        settings.clip_norm if settings.clip_norm is not None else 0.0,
        settings.seed,
        LOG_BETA1=math.log(settings.beta1) if settings.beta1 else None,
        LOG_BETA2=math.log(settings.beta2) if settings.beta2 else -math.inf,
        num_warps=1,
    )
