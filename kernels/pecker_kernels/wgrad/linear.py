"""The products of nn.Linear, each by itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from .. import reference
from ..torch_library.wgrad import tile_weight_grad
from .rows import pick
from .tiles import Tiles


class Linear:
    """x [..., in], weight [out, in], grad_out [..., out]."""

    def __init__(self, triton: bool) -> None:
        self.triton = triton

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def grad_input(self, grad_out: Tensor, weight: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
        return grad_out @ weight

    def grad_bias(self, grad_out: Tensor) -> Tensor:
        return grad_out.reshape(-1, grad_out.shape[-1]).sum(0)

    def grad_rows(self, grad_out: Tensor, x: Tensor, rows: slice | Tensor, shape: Sequence[int]) -> Tensor:
        """[live rows, in]."""
        g = pick(grad_out.reshape(-1, grad_out.shape[-1]), 1, rows)
        return g.t() @ x.reshape(-1, x.shape[-1])

    def grad_tiles(self, grad_out: Tensor, x: Tensor, tiles: Tiles, shape: Sequence[int]) -> Tensor:
        """[lanes]."""
        g, x = grad_out.reshape(-1, grad_out.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.triton:
            return tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile, "triton")
        return reference.strip_weight_grad(g, x, [(strip.rows, strip.inputs) for strip in tiles.strips])
