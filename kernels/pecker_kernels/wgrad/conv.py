"""The products of nn.Conv1d, Conv2d and Conv3d without groups, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .rows import pick
from .tiles import Tiles

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(t: Tensor) -> bool:
    return t.dim() in _LAST and t.stride(1) == 1 and t.is_contiguous(memory_format=_LAST[t.dim()])


class Convolution:
    """x [N, in, *pixels], weight [out, in, *kernel], grad_out [N, out, *pixels]; zero padding."""

    def __init__(self, module: Any) -> None:
        self.stride, self.dilation = list(module.stride), list(module.dilation)
        self.more: list[int] = []  # of torch.nn.functional.pad: "same" with even kernels pads more behind than before
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
            self.padding = [n // 2 for n in total]
            if any(n % 2 for n in total):
                self.more = [side for n in reversed(total) for side in (0, n % 2)]
        else:
            self.padding = [0] * len(self.stride) if module.padding == "valid" else list(module.padding)
        self.spatial = len(self.stride)

    def prepare(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.more) if self.more else x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, [0], 1)

    def _backward(self, grad_out: Tensor, x: Tensor, weight: Tensor, which: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad_out, x, weight, None, self.stride, self.padding, self.dilation, False, [0], 1, which
        )

    def grad_input(self, grad_out: Tensor, weight: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
        """x is known by its shape alone; its layout, by which the library chooses its kernel, is given by the weight."""
        if channels_last:
            weight = torch.empty_like(weight, memory_format=_LAST[weight.dim()]).copy_(weight)
        x = grad_out.new_empty(1).expand(shape)
        return self._backward(grad_out, x, weight, [True, False, False])[0]

    def grad_bias(self, grad_out: Tensor) -> Tensor:
        return grad_out.sum([0, *range(2, grad_out.dim())])

    def _grad_weight(self, grad_out: Tensor, x: Tensor, kernel: Sequence[int]) -> Tensor:
        weight = grad_out.new_empty(1).expand(grad_out.shape[1], x.shape[1], *kernel)  # only its shape is read
        return self._backward(grad_out, x, weight, [False, True, False])[1]

    def grad_rows(self, grad_out: Tensor, x: Tensor, rows: slice | Tensor, shape: Sequence[int]) -> Tensor:
        """[live rows, in, *kernel]."""
        return self._grad_weight(pick(grad_out, 1, rows), x, shape[2:])

    def grad_tiles(self, grad_out: Tensor, x: Tensor, tiles: Tiles, shape: Sequence[int]) -> Tensor:
        """[lanes]; all taps of the input channels that a strip touches are computed."""
        lanes = []
        for strip in tiles.strips:
            g = self._grad_weight(pick(grad_out, 1, strip.rows), pick(x, 1, strip.inputs), shape[2:])
            lanes.append(pick(g.reshape(g.shape[0], -1), 1, strip.columns).reshape(-1))
        return torch.cat(lanes)
