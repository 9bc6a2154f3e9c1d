"""torch.ops.pecker.group_norm_silu and its way back, for compilers and tracing; eager code calls norm.group_norm_silu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..norm import function


@torch.library.custom_op("pecker::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, C, …], mean [N, groups], rstd [N, groups]). Raises PeckerKernelsError as norm.group_norm_silu does."""
    function.check(x, weight, bias, groups)
    return function.forward(x, weight, bias, groups, eps, silu, impl)


@torch.library.custom_op("pecker::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias."""
    grad_x, grad_weight, grad_bias = function.backward(grad, x, weight, bias, mean, rstd, groups, silu, impl)
    assert grad_x is not None
    assert grad_weight is not None
    assert grad_bias is not None
    return grad_x, grad_weight, grad_bias


@group_norm_silu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, silu: bool = True, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=wide) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@group_norm_silu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, groups, _, silu, impl = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.options = groups, silu, impl


def _back(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    found = torch.ops.pecker.group_norm_silu_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*found, None, None, None, None)


group_norm_silu.register_autograd(_back, setup_context=_keep)


@register_flop_formula([torch.ops.pecker.group_norm_silu, torch.ops.pecker.group_norm_silu_backward])
def _no_products(*_: Any, **__: Any) -> int:
    """None, as torch counts its own norms and activations: what an account compares is products."""
    return 0
