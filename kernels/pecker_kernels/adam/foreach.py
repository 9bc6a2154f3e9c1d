"""Adam, clipping and finite checks over lists of tensors: one call of a torch multi-tensor operation where there is
one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import native, reference
from . import cpu

_FUSED_DEVICES = ("cpu", "cuda")


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """0-dim bool tensor on the first tensor's device: whether no value is NaN or inf. None and empty tensors count as
    finite.

    Nothing waits for the device until the answer is used.
    """
    live = [t.detach() for t in tensors if t is not None and t.numel()]
    if not live:
        return torch.tensor(True)
    if all(t.device.type == "cpu" and t.dtype in cpu.DTYPES for t in live) and native.available():
        return torch.tensor(cpu.all_finite(live))
    # The largest magnitude is NaN or inf exactly where some value is: one read, no temporary of the tensor's size.
    norms = torch._foreach_norm(live, float("inf"))
    return torch.stack([n.to(live[0].device, torch.float64) for n in norms]).isfinite().all()


def clip_(grads: Sequence[Tensor], clip_value: float | None, clip_norm: float | None) -> None:
    """See reference.clip_."""
    grads = list(grads)
    if not grads:
        return
    if clip_value is not None:
        torch._foreach_clamp_min_(grads, -clip_value)
        torch._foreach_clamp_max_(grads, clip_value)
    if clip_norm is not None:
        norms = torch._foreach_norm(grads)
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float32) for n in norms]))
        factor = (clip_norm / (total + 1e-6)).clamp_(max=1.0)
        for g in grads:
            g.mul_(factor.to(g.device))


def _one_layout(*tensors: Tensor) -> bool:
    """The fused operation walks memory, so its operands must be dense; it takes equal strides alone, unlike `jobs.alike`."""
    strides = tensors[0].stride()
    return all(t.stride() == strides for t in tensors) and (
        tensors[0].is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensors[0])
    )


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    impl: str = "auto",
) -> None:
    """One Adam step on lists of tensors, in place; `steps` are 0-dim float32 tensors already counting this step, from
    1.

    exp_avgs None needs β₁ = 0, and with L2 weight decay `grads` are overwritten. The formula is reference.adam_; impl
    "auto" runs torch's fused kernel where the operands share device, dtype and layout.
    """
    fused: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    plain: list[int] = []
    for i, (p, g, v) in enumerate(zip(params, grads, exp_avg_sqs)):
        operands = (p, g, v) if exp_avgs is None else (p, g, v, exp_avgs[i])
        if not p.numel():
            continue
        if (
            impl == "auto"
            and p.device.type in _FUSED_DEVICES
            and all(t.dtype == p.dtype for t in operands)
            and _one_layout(*operands)
        ):
            fused.setdefault((p.device, p.dtype), []).append(i)
        else:
            plain.append(i)
    operation = torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_
    for (device, _), chosen in fused.items():
        # With β₁ = 0 the first moment is the gradient itself: handing the gradient over as the moment writes the same
        # value back.
        first = grads if exp_avgs is None else exp_avgs
        operation(
            [params[i] for i in chosen],
            [grads[i] for i in chosen],
            [first[i] for i in chosen],
            [exp_avg_sqs[i] for i in chosen],
            [],
            [steps[i].to(device) for i in chosen],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )
    for i in plain:
        reference.adam_(
            params[i],
            grads[i],
            None if exp_avgs is None else exp_avgs[i],
            exp_avg_sqs[i],
            int(steps[i]),
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )
