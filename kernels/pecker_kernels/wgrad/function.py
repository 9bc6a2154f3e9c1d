"""A linear layer or convolution whose backward pass computes live weight gradients alone."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .conv import Convolution, is_channels_last
from .linear import Linear
from .plan import Part
from .rows import pick


@dataclass(frozen=True)
class LayerPlan:
    """products: the layer's. weight, bias: their parts. weight_leaf, bias_leaf: leaf tensors that receive the compact
    gradients, None where there is none to receive (dead) or the parameter itself receives it (dense bias).
    shape: of the weight."""

    products: Linear | Convolution
    weight: Part
    bias: Part
    weight_leaf: Tensor | None
    bias_leaf: Tensor | None
    shape: Sequence[int]

    def grad_weight(self, grad_out: Tensor, x: Tensor) -> Tensor:
        if self.weight.tiles is not None:
            return self.products.grad_tiles(grad_out, x, self.weight.tiles, self.shape)
        assert self.weight.rows is not None
        return self.products.grad_rows(grad_out, x, self.weight.rows, self.shape)


class LiveProduct(torch.autograd.Function):
    """y of the layer; gradients of x, of a dense bias and of the leaves. The weight comes detached: its gradient is the
    leaf's. Neither x nor the weight is kept where no gradient asks for it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_leaf: Tensor | None,
        bias_leaf: Tensor | None,
        plan: LayerPlan,
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.plan, ctx.shape, ctx.channels_last = plan, x.shape, is_channels_last(x)
        ctx.save_for_backward(weight if needs_x else None, x if needs_weight else None)
        return plan.products.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, x = ctx.saved_tensors
        plan, (needs_x, _, needs_bias, needs_leaf, needs_bias_leaf, _) = ctx.plan, ctx.needs_input_grad
        products = plan.products
        grad_x = grad_bias = grad_leaf = grad_bias_leaf = None
        device = grad_out.device.type
        # All operands have the dtype that the forward pass chose. A compiler traces this while it traces the forward pass, and
        # would carry "off" over into the rest of that.
        casting = torch.is_autocast_enabled(device) and not torch.compiler.is_compiling()
        with torch.autocast(device, enabled=False) if casting else nullcontext():
            if needs_x:
                grad_x = products.grad_input(grad_out, weight, ctx.shape, ctx.channels_last)
            if needs_leaf:
                grad_leaf = plan.grad_weight(grad_out, x).to(plan.weight_leaf.dtype)
            if needs_bias or needs_bias_leaf:
                grad_bias = products.grad_bias(grad_out)
            if needs_bias_leaf:
                assert grad_bias is not None
                grad_bias_leaf = pick(grad_bias, 0, plan.bias.rows).to(plan.bias_leaf.dtype)
        return grad_x, None, grad_bias if needs_bias else None, grad_leaf, grad_bias_leaf, None


class Switch:
    """Whether the layers of one model compute live gradients (not `paused`)."""

    paused = 0


def own_forward(module: nn.Module) -> types.MethodType:
    """The forward of the module's class, bound."""
    return types.MethodType(type(module).forward, module)


class LiveForward:
    """Stands in for module.forward. A copied or unpickled module gets its class's own forward instead."""

    def __init__(self, module: Any, plan: LayerPlan, switch: Switch) -> None:
        self.module, self.plan, self.switch = module, plan, switch
        self._planned = self._weight()

    def _weight(self) -> tuple[int, torch.dtype, torch.device, bool]:
        weight = self.module.weight
        return id(weight), weight.dtype, weight.device, weight.requires_grad or self.plan.weight.mode == "dead"

    def is_stale(self) -> bool:
        """Whether the weight is not the one that was planned for."""
        return self._weight() != self._planned

    def __call__(self, input: Tensor) -> Tensor:
        module, plan = self.module, self.plan
        if self.switch.paused or not torch.is_grad_enabled():
            return type(module).forward(module, input)
        x, weight, bias = _autocast(input, module.weight.detach(), module.bias)
        if bias is not None and plan.bias.mode != "dense":
            bias = bias.detach()
        products = plan.products
        alone = isinstance(products, Convolution) and x.dim() == products.spatial + 1  # an image without its batch
        x = products.prepare(x.unsqueeze(0) if alone else x)
        y = LiveProduct.apply(x, weight, bias, plan.weight_leaf, plan.bias_leaf, plan)
        return y.squeeze(0) if alone else y

    def __reduce__(self) -> Any:
        return own_forward, (self.module,)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as torch.autocast casts for these layers: float64 stays."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)
