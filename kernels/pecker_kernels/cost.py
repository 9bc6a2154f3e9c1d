"""What one MaskedAdam step costs at least, from the very bits of its mask: FLOPs, bytes moved, bytes of state.

The step runs outside torch's dispatcher, so no counter sees it; spec.SPECS has the same formulas for a mask at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adam.state import HALF, LaneState
from .adam.torch_ops import work_dtype
from .torch_library.adam import ADAM_FLOPS, EMA_FLOPS, MASKED_GRAD_FLOPS
from .torch_library.scores import CLIP_NORM_FLOPS

CLIP_VALUE_FLOPS = 2  # of one weight: two comparisons
CHECK_FLOPS = 1
Gradients = Mapping[str, Tensor] | Sequence[Tensor | None]


class Cost(NamedTuple):
    """FLOPs as in spec; bytes: every value read or written once, lines of weights and gradients whole."""

    flops: int
    bytes_moved: int

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.flops + other.flops, self.bytes_moved + other.bytes_moved)


def line_bytes(device: torch.device) -> int:
    """What memory delivers at least: a cache line of a processor, a sector of a GPU."""
    return 32 if device.type == "cuda" else 64


def live_lines(bits: Tensor, lanes: int) -> int:
    """Lines of `lanes` values (a multiple of 8) in which `bits` keep one; row-major, the first line begins at value 0."""
    width = lanes // 8
    packed = torch.nn.functional.pad(bits.reshape(-1), (0, -bits.numel() % width))
    return int((packed.view(-1, width) != 0).any(1).sum())


def step_cost(
    optimizer: LaneState,
    masked_grads: Gradients | None = None,
    *,
    compact_grads: Gradients | None = None,
    dense: bool = False,
) -> Cost:
    """Of the step that `optimizer.step(masked_grads, compact_grads=...)` takes with the gradients its parameters have now.

    dense: of the same settings without mask and masked_grads, every parameter with a gradient.
    """
    total = Cost(0, 0)
    for i, (name, p, group) in enumerate(optimizer._named()):
        if dense:
            total += _tensor_cost(p, p.nbytes, None, p.numel(), group)
            continue
        extra = _entry(masked_grads, name, i)
        grad = _entry(compact_grads, name, i)
        grad = p.grad if grad is None else grad
        if grad is None and extra is None:
            continue
        lanes = optimizer._lanes_of(p, name)
        bits = lanes.bits if masked_grads is None else None
        total += _tensor_cost(p, 0 if grad is None else _read(grad, p, bits), bits, lanes.count, group)
        if extra is not None:
            read = _read(extra, p, lanes.bits) + (0 if lanes.bits is None else lanes.bits.numel())
            total += Cost(MASKED_GRAD_FLOPS * lanes.count, read)
    return total


def _entry(grads: Gradients | None, name: str | None, i: int) -> Tensor | None:
    if grads is None:
        return None
    return grads.get(str(name)) if isinstance(grads, Mapping) else grads[i]


def _read(grad: Tensor, p: Tensor, bits: Tensor | None) -> int:
    """Bytes of a gradient that one pass reads: all of a compact one, live lines of one of the weights' shape."""
    return grad.nbytes if bits is None or grad.shape != p.shape else _live_bytes(grad, bits)


def _live_bytes(tensor: Tensor, bits: Tensor) -> int:
    """Of the lines in which a weight is kept."""
    line = line_bytes(tensor.device)
    return min(tensor.nbytes, line * live_lines(bits, line // tensor.element_size()))


def _tensor_cost(p: Tensor, grad_bytes: int, bits: Tensor | None, kept: int, group: dict[str, Any]) -> Cost:
    """One tensor of whose gradient a pass reads `grad_bytes` (0: none); bits None: every weight is stepped on."""
    stepped = p.numel() if bits is None else kept
    weights = p.nbytes if bits is None else _live_bytes(p, bits)
    clip_norm, check = group["clip_norm"] is not None, bool(group["check_finite"])
    flops = ADAM_FLOPS + EMA_FLOPS * (group["ema"] is not None) + CLIP_VALUE_FLOPS * (group["clip_value"] is not None)
    flops += CLIP_NORM_FLOPS * clip_norm + CHECK_FLOPS * check
    states = 1 + (group["betas"][0] != 0) + (group["ema"] is not None) + (group["master"] == "fp32" and p.dtype in HALF)
    state = torch.empty((), dtype=work_dtype(p)).element_size() * stepped
    # Weights and state are read and written; clipping by norm and the check read the gradient once more each.
    moved = 2 * states * state + 2 * weights + grad_bytes * (1 + clip_norm + check)
    return Cost(flops * stepped, moved + (0 if bits is None else bits.numel()))
