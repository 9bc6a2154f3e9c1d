"""torch.library operations (torch.ops.pecker.*) and the functional masked Adam: opaque to torch.compile, with shapes
for fake tensors.

impl chooses an implementation by name: "auto" | "triton" | "cpu" | "reference"; a named one is used or
PeckerKernelsError is raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import bitmask
from .adam_jobs import AdamJob, AdamStep
from .adam_step import AdamPlan, choose
from .bitmask import check_bits
from .errors import MaskError, PeckerKernelsError
from .lanes import Lanes

# Of one kept weight: exp_avg 3, exp_avg_sq 4, denominator 3 (root, bias, eps), quotient and weight 3.
ADAM_FLOPS = 13


@torch.library.custom_op("pecker::pack_bits", mutates_args=())
def pack_bits(keep: Tensor, impl: str = "auto") -> Tensor:
    """See bitmask.pack_bits."""
    return bitmask.pack_bits(keep, impl)


@pack_bits.register_fake
def _(keep: Tensor, impl: str = "auto") -> Tensor:
    return keep.new_empty((keep.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("pecker::unpack_bits", mutates_args=())
def unpack_bits(bits: Tensor, n: int, impl: str = "auto") -> Tensor:
    """See bitmask.unpack_bits."""
    # An operation must not return a view of its input; the slice of a fresh tensor is not one.
    return bitmask.unpack_bits(bits, n, impl).contiguous()


@unpack_bits.register_fake
def _(bits: Tensor, n: int, impl: str = "auto") -> Tensor:
    return bits.new_empty(n, dtype=torch.bool)


@torch.library.custom_op("pecker::popcount", mutates_args=())
def popcount(bits: Tensor, impl: str = "auto") -> Tensor:
    """See bitmask.popcount; a 0-dim int64 tensor on the device of `bits`."""
    return torch.tensor(bitmask.popcount(bits, impl), dtype=torch.int64, device=bits.device)


@popcount.register_fake
def _(bits: Tensor, impl: str = "auto") -> Tensor:
    return bits.new_empty((), dtype=torch.int64)


@torch.library.custom_op("pecker::apply_", mutates_args=("tensor",))
def apply_(tensor: Tensor, bits: Tensor, impl: str = "auto") -> None:
    """See bitmask.apply_."""
    bitmask.apply_(tensor, bits, impl)


@apply_.register_fake
def _(tensor: Tensor, bits: Tensor, impl: str = "auto") -> None:
    return None


def _check_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bits: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
) -> None:
    for name, tensors, may_be_empty in (
        ("grads", grads, False),
        ("bits", bits, True),
        ("exp_avgs", exp_avgs, beta1 == 0),
        ("exp_avg_sqs", exp_avg_sqs, False),
    ):
        if len(tensors) != len(params) and not (may_be_empty and not tensors):
            raise PeckerKernelsError(f"{name} has {len(tensors)} tensors for {len(params)} params")


@torch.library.custom_op("pecker::masked_adam_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def masked_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    bits: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    impl: str = "auto",
) -> None:
    """One Adam step on the weights that `bits` keep, in place; the formula is reference.adam_. Weights outside are
    never written.

    params, grads: float32 or float64 tensors, pairwise of one shape. bits: uint8 [ceil(n / 8)] each, or [] for all
    weights. exp_avgs, exp_avg_sqs: compact moments [number of ones] in position order (shape of the parameter where all
    weights are kept); exp_avgs may be [] when beta1 is 0. step: the number of this step, from 1. Clipping as in
    reference.clip_, over the kept weights.

    Raises PeckerKernelsError for lists that do not match and MaskError for bits or moments of the wrong size.
    """
    _check_lists(params, grads, bits, exp_avgs, exp_avg_sqs, beta1)
    if step < 1:
        raise PeckerKernelsError(f"step counts from 1, got {step}")
    jobs = []
    first_index = 0
    for i, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            raise PeckerKernelsError(f"params[{i}] is {p.dtype}: the functional form takes float32 and float64")
        lanes = Lanes(p.shape)
        if bits:
            check_bits(bits[i], p.numel(), f"bits[{i}]")
            lanes = Lanes(p.shape, bits[i].to(p.device))
            lanes = Lanes(p.shape) if lanes.count == p.numel() else lanes
        if exp_avg_sqs[i].numel() != lanes.count or (exp_avgs and exp_avgs[i].numel() != lanes.count):
            raise MaskError(f"moments of params[{i}] do not hold one value for each of its {lanes.count} kept weights")
        masked = lanes.bits is not None
        like = (lanes.count,) if masked else p.shape
        jobs.append(
            AdamJob(
                param=p,
                grad=grads[i],
                masked_grad=None,
                bits=lanes.bits,
                whole=not masked,
                compact=masked,
                exp_avg=exp_avgs[i].view(like) if exp_avgs else None,
                exp_avg_sq=exp_avg_sqs[i].view(like),
                master=None,
                ema=None,
                step=torch.tensor(float(step), device=p.device),
                first_index=first_index,
                kept=lanes,
            )
        )
        first_index += p.numel()
    if not jobs:
        return
    settings = AdamStep(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        clip_value=clip_value,
        clip_norm=clip_norm,
        ema=None,
        seed=0,
    )
    AdamPlan(jobs, which=choose(impl, jobs)).step(settings)


@masked_adam_.register_fake
def _(
    params: list[Tensor],
    grads: list[Tensor],
    bits: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    impl: str = "auto",
) -> None:
    return None


# FlopCounterMode counts an operation it does not know as zero without a word.
@register_flop_formula(torch.ops.pecker.masked_adam_)
def _masked_adam_flops(params_shape, grads_shape, bits_shape, exp_avgs_shape, exp_avg_sqs_shape, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return ADAM_FLOPS * sum(torch.Size(shape).numel() for shape in exp_avg_sqs_shape)


_BIT_OPERATIONS = [getattr(torch.ops.pecker, name) for name in ("pack_bits", "unpack_bits", "popcount", "apply_")]


@register_flop_formula(_BIT_OPERATIONS)
def _no_flops(*_, **__) -> int:  # type: ignore[no-untyped-def]
    return 0
