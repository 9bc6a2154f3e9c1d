"""GroupNorm (arXiv 1803.08494) and SiLU (arXiv 1702.03118) as one operation: y = u · σ(u), u = (x − mean) · rstd · weight + bias.

The way back needs x, mean and rstd alone; torch's two operations also keep the tensor between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..dispatch import resolve, triton_kernels
from ..errors import PeckerKernelsError
from . import cpu

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """silu(group_norm(x, groups, weight, bias, eps)), [N, C, …], in the dtype and memory order of x; differentiable once.

    x: [N, C, …] of a floating dtype, plain or channels last (others are copied). weight, bias: [C]. silu False: the norm alone.
    impl: "auto" | "triton" | "cpu" | "reference"; the C++ takes float32, Triton float32, bfloat16 and float16; statistics are
    float32 or wider. Raises PeckerKernelsError for shapes that do not belong together and for what a named implementation
    cannot serve.
    """
    check(x, weight, bias, groups)
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        y: Tensor = torch.ops.pecker.group_norm_silu(x, weight, bias, groups, eps, silu, impl)[0]
        return y
    return GroupNormSiLU.apply(x, weight, bias, groups, eps, silu, impl)


class GroupNormSiLU(torch.autograd.Function):
    """As it runs in eager mode: a call of torch.ops.pecker.* costs tens of microseconds more, as much as a small norm itself."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, impl: str
    ) -> Tensor:
        y, mean, rstd = forward(x, weight, bias, groups, eps, silu, impl)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = groups, silu, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        groups, silu, impl = ctx.options
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = needs_x, needs_weight or needs_bias
        found = backward(grad, x, weight, bias, mean, rstd, groups, silu, impl, *needs)
        return (*found, None, None, None, None)


def check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    """Raises PeckerKernelsError unless a norm of this many groups can be taken."""
    if x.dim() < 2 or not x.is_floating_point():
        raise PeckerKernelsError(f"a norm takes floating [N, C, …], got {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise PeckerKernelsError(f"{channels} channels are no multiple of {groups} groups")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != (channels,) or t.device != x.device:
            raise PeckerKernelsError(
                f"{name} is {list(t.shape)} on {t.device}, a norm of x {list(x.shape)} on {x.device} needs [{channels}] there"
            )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [N, groups], rstd [N, groups]); the last two are float32 or wider."""
    serving = _serving(x, weight, bias, impl)
    if serving == "cpu":
        return cpu.forward(x, weight, bias, groups, eps, silu)
    if serving == "triton":
        found: tuple[Tensor, Tensor, Tensor] = triton_kernels("norm").forward(x, weight, bias, groups, eps, silu)
        return found
    return reference.group_norm_silu(x, weight, bias, groups, eps, silu)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool, impl: str,
    needs_x: bool = True, needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias in their dtypes; None where they are not needed."""
    serving = _serving(x, weight, bias, impl)
    if serving == "cpu":
        return cpu.backward(grad, x, weight, bias, mean, rstd, groups, silu, needs_x, needs_weight)
    if serving == "triton":
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = triton_kernels("norm").backward(
            grad, x, weight, bias, mean, rstd, groups, silu, needs_x, needs_weight
        )
        return found
    return reference.group_norm_silu_backward(
        grad, x, weight, bias, mean, rstd, groups, silu, (needs_x, needs_weight, needs_weight)
    )


def _serving(x: Tensor, weight: Tensor, bias: Tensor, impl: str) -> str:
    """ "auto" falls back to torch for dtypes and devices that no kernel takes; a named one says what it misses."""
    chosen = resolve(impl, x, weight, bias)
    if impl != "auto":
        return chosen
    if chosen == "cpu" and cpu.refusal(x, weight, bias) is not None:
        return "reference"
    if chosen == "triton" and not all(t.dtype in SERVED for t in (x, weight, bias)):
        return "reference"
    return chosen
