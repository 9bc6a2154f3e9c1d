"""torch.library operations on masks (torch.ops.pecker.*) and the functional masked Adam: opaque to torch.compile, with
shapes for fake tensors. Those on scores and thresholds are in ops_select.

impl chooses an implementation by name: "auto" | "triton" | "cpu" | "reference"; a named one is used or
PeckerKernelsError is raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..adam.jobs import AdamJob, AdamStep, refuse_shared
from ..adam.lanes import Lanes
from ..adam.settings import check_numbers
from ..adam.step import AdamPlan, choose
from ..adam.torch_ops import work_dtype
from ..errors import MaskError, PeckerKernelsError
from ..mask import bits as bitmask
from ..mask.bits import sound_bits

# Of one weight that is stepped on: exp_avg 3, exp_avg_sq 4, denominator 3 (root, bias, eps), quotient and weight 3.
ADAM_FLOPS = 13
MASKED_GRAD_FLOPS = 1  # the addition, counted for every weight: shapes do not tell how many a mask keeps
EMA_FLOPS = 3


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


def _check_lists(n: int, lists: dict[str, Sequence[Tensor]], may_be_empty: Sequence[str]) -> None:
    for name, tensors in lists.items():
        if len(tensors) != n and not (name in may_be_empty and not tensors):
            raise PeckerKernelsError(f"{name} has {len(tensors)} tensors for {n} params")


def _check_dtypes(i: int, p: Tensor, state: Sequence[Tensor], has_master: bool) -> None:
    half, work = p.dtype in (torch.bfloat16, torch.float16), work_dtype(p)
    if not p.is_floating_point():
        raise PeckerKernelsError(f"params[{i}] is {p.dtype}: only floating weights can be stepped on")
    if p.dtype == torch.float16 and not has_master:
        raise PeckerKernelsError(f"params[{i}] is float16, which loses small updates: pass float32 masters")
    if has_master and not half:
        raise PeckerKernelsError(f"params[{i}] is {p.dtype}: only 16-bit weights have masters")
    for t in state:
        if t.dtype != work:
            raise PeckerKernelsError(f"the state of params[{i}] is {t.dtype}: {p.dtype} weights keep it in {work}")


# A list may only be missing in a schema that is written out.
@torch.library.custom_op(
    "pecker::masked_adam_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "emas", "masters"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor[] bits, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "SymInt step, float lr=0.001, float beta1=0.9, float beta2=0.999, float eps=1e-08, float weight_decay=0.0, "
    "bool decoupled_weight_decay=False, float? clip_value=None, float? clip_norm=None, str impl='auto', "
    "Tensor[]? masked_grads=None, Tensor(d!)[]? emas=None, float? ema=None, Tensor(e!)[]? masters=None, "
    "SymInt seed=0) -> ()",
)
def masked_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bits: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
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
    masked_grads: Sequence[Tensor] | None = None,
    emas: Sequence[Tensor] | None = None,
    ema: float | None = None,
    masters: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> None:
    """One Adam step in place; the formula is reference.adam_, the order of everything around it is that of AdamStep.

    Without masked_grads the weights that `bits` keep are stepped on and no other is ever written. With masked_grads,
    the differentiated rule (2604.05634): a step on every weight, on grad + m ⊙ masked_grad.

    params: floating tensors; float16 needs masters, bfloat16 without them is rounded stochastically. grads, masked_grads:
    of the shapes of params, any floating dtype. bits: uint8 [ceil(n / 8)] each, or [] for all weights. exp_avgs,
    exp_avg_sqs, emas (averages of the weights), masters (float32 truth of 16-bit weights): compact, [number of ones] in
    position order, or of the parameter's shape where all weights are stepped on; float64 for float64 weights, float32
    else. exp_avgs may be [] when beta1 is 0; masked_grads, emas and masters None or [] are none.
    step: the number of this step, from 1. Clipping as in reference.clip_, over the weights stepped on. ema: decay d of
    e ← e + (1-d)·(p - e), with emas. seed: of the stochastic rounding, 0 to 2**63 - 1; steps differ by themselves.

    Raises PeckerKernelsError for lists and dtypes that do not match and MaskError for bits or state of the wrong size.
    """
    masked_grads, emas, masters = masked_grads or [], emas or [], masters or []
    lists = {"grads": grads, "bits": bits, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"masked_grads": masked_grads, "emas": emas, "masters": masters}
    optional = ["bits", "masked_grads", "emas", "masters", *(["exp_avgs"] if beta1 == 0 else [])]
    _check_lists(len(params), lists, optional)
    if step < 1:
        raise PeckerKernelsError(f"step counts from 1, got {step}")
    if (ema is None) == bool(emas) or (ema is not None and not 0 <= ema <= 1):
        raise PeckerKernelsError(f"emas and ema (a decay from 0 to 1) come together, got {len(emas)} and {ema}")
    given = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "seed": seed}
    check_numbers({**given, "clip_value": clip_value, "clip_norm": clip_norm, "ema": ema})
    jobs = []
    first_index = 0
    for i, p in enumerate(params):
        state = [None if not of else of[i] for of in (exp_avgs, exp_avg_sqs, emas, masters)]
        _check_dtypes(i, p, [t for t in state if t is not None], bool(masters))
        for name in ("grads", "masked_grads"):
            if lists[name] and lists[name][i].shape != p.shape:
                raise PeckerKernelsError(f"{name}[{i}] is {list(lists[name][i].shape)}, params[{i}] {list(p.shape)}")
        lanes = Lanes(p.shape)
        if bits:
            lanes = Lanes(p.shape, sound_bits(bits[i], p.numel(), f"bits[{i}]").to(p.device))
            lanes = Lanes(p.shape) if lanes.count == p.numel() else lanes
        compact = lanes.bits is not None and not masked_grads
        like = torch.Size([lanes.count]) if compact else p.shape
        if any(t is not None and t.numel() != like.numel() for t in state):
            kind = "kept weights" if compact else "weights"
            raise MaskError(f"the state of params[{i}] does not hold one value for each of its {like.numel()} {kind}")
        for t in state:
            if t is not None and t.shape != like and (compact or t.dim() != 1):  # flat where every weight is kept
                raise MaskError(f"the state of params[{i}] is {list(t.shape)}, its values stand in {list(like)}")
        exp_avg, exp_avg_sq, average, master = [None if t is None else t.view(like) for t in state]
        assert exp_avg_sq is not None
        jobs.append(
            AdamJob(
                param=p,
                grad=grads[i],
                masked_grad=masked_grads[i] if masked_grads else None,
                bits=lanes.bits,
                whole=not compact,
                compact=compact,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                master=master,
                ema=average,
                step=torch.tensor(float(step), device=p.device),
                first_index=first_index,
                kept=lanes,
            )
        )
        first_index += p.numel()
    if not jobs:
        return
    refuse_shared(jobs)
    settings = AdamStep(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        clip_value=clip_value,
        clip_norm=clip_norm,
        ema=ema,
        seed=seed,
    )
    AdamPlan(jobs, which=choose(impl, jobs)).step(settings)


@masked_adam_.register_fake
def _(*_, **__) -> None:  # type: ignore[no-untyped-def]
    return None


_ADAM_ARGUMENTS = [argument.name for argument in torch.ops.pecker.masked_adam_.default._schema.arguments]


# FlopCounterMode counts an operation it does not know as zero without a word.
@register_flop_formula(torch.ops.pecker.masked_adam_)
def _masked_adam_flops(*shapes, out_val=None, **named) -> int:  # type: ignore[no-untyped-def]
    given = {**dict(zip(_ADAM_ARGUMENTS, shapes)), **named}
    per_weight = ADAM_FLOPS + MASKED_GRAD_FLOPS * bool(given.get("masked_grads")) + EMA_FLOPS * bool(given.get("emas"))
    return per_weight * sum(torch.Size(shape).numel() for shape in given["exp_avg_sqs"])


_BIT_OPERATIONS = [getattr(torch.ops.pecker, name) for name in ("pack_bits", "unpack_bits", "popcount", "apply_")]


@register_flop_formula(_BIT_OPERATIONS)
def _no_flops(*_, **__) -> int:  # type: ignore[no-untyped-def]
    return 0
