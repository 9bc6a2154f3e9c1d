"""One-line adoption: an existing torch.optim.Adam becomes a MaskedAdam and keeps its moments."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import MaskError, PeckerKernelsError
from ..mask.saliency import SaliencyMask
from .optimizer import MaskedAdam
from .settings import DEFAULTS


def _names(optimizer: torch.optim.Optimizer, mask: SaliencyMask) -> list[list[str]]:
    groups = optimizer.param_groups
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    shapes = [p.shape for group in groups for p in group["params"]]
    if shapes != list(mask.shapes.values()):
        raise MaskError(
            "the optimizer's parameters have no names and do not match the mask's tensors in order and shape: "
            "build it from model.named_parameters()"
        )
    names = iter(mask.names)
    return [[next(names) for _ in group["params"]] for group in groups]


def adopt(optimizer: torch.optim.Adam, mask: SaliencyMask, **settings: Any) -> MaskedAdam:
    """A MaskedAdam over the same parameters with the same groups, lr, betas, eps, weight decay and moments.

    optimizer: torch.optim.Adam or AdamW without amsgrad and maximize. Parameters are matched to the mask by the names
    the
        optimizer was built with, else by order and shape.
    settings: further arguments of MaskedAdam (clip_value, ema, state, ...). With state="compact" moments outside the
    mask
        are dropped.

    The old optimizer is left as it is; learning-rate schedulers have to be made anew.

    Raises PeckerKernelsError for another kind of optimizer, MaskError where the mask does not fit.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise PeckerKernelsError(f"adopt takes a torch.optim.Adam or AdamW, got {type(optimizer).__name__}")
    if any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups):
        raise PeckerKernelsError("amsgrad and maximize have no counterpart in MaskedAdam")
    # Keys that a scheduler put into the groups (initial_lr) travel too; what the caller names here wins over the
    # groups.
    dropped = {"params", "param_names", "amsgrad", "maximize", "foreach", "differentiable", "fused", *settings}
    groups = [
        {
            **{key: value for key, value in group.items() if key not in dropped},
            "params": list(zip(names, group["params"])),
        }
        for group, names in zip(optimizer.param_groups, _names(optimizer, mask))
    ]
    first = {key: optimizer.defaults[key] for key in DEFAULTS if key in optimizer.defaults}
    adopted = MaskedAdam(groups, mask=mask, **{**first, **settings})
    saved = optimizer.state_dict()
    for theirs, ours in zip(saved["param_groups"], adopted.state_dict()["param_groups"]):
        ids = theirs["params"]
        theirs.clear()
        theirs.update(ours, params=ids, mask_sha256=None)
    adopted.load_state_dict(saved)
    return adopted
