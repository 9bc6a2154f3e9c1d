"""The door to csrc/group_norm.cpp: float32 images on the CPU, channels first or channels last."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PeckerKernelsError
from ..native import library


def channels_last(x: Tensor) -> bool:
    """Whether x [N, C, …] has its channels next to each other in memory, and is not plain as well."""
    return not x.is_contiguous() and x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def arranged(x: Tensor, last: bool) -> Tensor:
    """x in one of the two memory orders, copied where it is in neither."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def refusal(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors; None where they can."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t.device.type != "cpu" or t.dtype != torch.float32:
            return f"{name} is {t.dtype} on {t.device}: the C++ norm takes float32 CPU tensors"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, C, …] in the memory order of x, mean [N, groups], rstd [N, groups])."""
    _take(x, weight, bias)
    last = channels_last(x)
    x, weight, bias = arranged(x, last), weight.contiguous(), bias.contiguous()
    n, channels = x.shape[:2]
    y = torch.empty_like(x)
    mean, rstd = torch.empty(n, groups), torch.empty(n, groups)
    if x.numel():
        library().pecker_norm_silu(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            n, channels, x.numel() // (n * channels), groups, eps, silu, last, torch.get_num_threads(),
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    needs_x: bool = True, needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias, those that are needed."""
    _take(x, weight, bias)
    last = channels_last(x)
    grad, x, weight, bias = arranged(grad, last), arranged(x, last), weight.contiguous(), bias.contiguous()
    n, channels = x.shape[:2]
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weight, grad_bias = (torch.zeros(channels), torch.zeros(channels)) if needs_weight else (None, None)
    if x.numel():
        sums = torch.empty(2, n, channels, dtype=torch.float64)
        library().pecker_norm_silu_backward(
            grad.data_ptr(), x.data_ptr(), weight.data_ptr(), bias.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            *(None if t is None else t.data_ptr() for t in (grad_x, grad_weight, grad_bias)), sums.data_ptr(),
            n, channels, x.numel() // (n * channels), groups, silu, last, torch.get_num_threads(),
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _take(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    reason = refusal(x, weight, bias)
    if reason is not None:
        raise PeckerKernelsError(reason)
