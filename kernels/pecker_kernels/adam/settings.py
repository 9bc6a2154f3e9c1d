"""The settings of MaskedAdam's parameter groups and what is refused in them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import check_impl
from ..errors import PeckerKernelsError

# What torch.optim.Adam keeps in a group, at its defaults.
TORCH_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
DEFAULTS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "capturable")


def check_numbers(group: dict[str, Any]) -> None:
    """`check_group` of what the functional step has too."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise PeckerKernelsError("Tensor lr must be 1-element")
    if not lr >= 0.0:  # refuses NaN too
        raise PeckerKernelsError(f"Invalid learning rate: {lr}")
    if not group["eps"] >= 0.0:  # refuses NaN too
        raise PeckerKernelsError(f"Invalid epsilon value: {group['eps']}")
    for i in (0, 1):
        if not 0.0 <= betas[i] < 1.0:
            raise PeckerKernelsError(f"Invalid beta parameter at index {i}: {betas[i]}")
    if not group["weight_decay"] >= 0.0:  # refuses NaN too
        raise PeckerKernelsError(f"Invalid weight_decay value: {group['weight_decay']}")
    if not all(isinstance(beta, float) for beta in betas):
        raise PeckerKernelsError(f"betas must be both floats, got {betas}")
    for key in ("clip_value", "clip_norm"):
        if group[key] is not None and not group[key] > 0.0:
            raise PeckerKernelsError(f"Invalid {key}: {group[key]} (a positive number, or None for no clipping)")
    if group["ema"] is not None and not 0.0 <= group["ema"] <= 1.0:
        raise PeckerKernelsError(f"Invalid ema decay: {group['ema']} (between 0 and 1, or None for no average)")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int) or not 0 <= group["seed"] < 2**63:
        raise PeckerKernelsError(f"Invalid seed: {group['seed']} (an integer from 0 to 2**63 - 1)")


def check_group(group: dict[str, Any]) -> None:
    """Raise PeckerKernelsError (a ValueError) for a bad setting, in torch.optim.Adam's words where it has some."""
    check_numbers(group)
    if group["master"] not in (None, "fp32"):
        raise PeckerKernelsError(f"Invalid master: {group['master']!r} (choose 'fp32' or None)")
    if not isinstance(group["check_finite"], bool):
        raise PeckerKernelsError(f"Invalid check_finite: {group['check_finite']!r} (True or False)")
    if group["state"] not in ("compact", "dense"):
        raise PeckerKernelsError(f"Invalid state: {group['state']!r} (choose 'compact' or 'dense')")
    check_impl(group["impl"])
