"""The most bytes that were alive at once while something ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pecker_fast.account.iteration import state_tensors
from pecker_fast.account.live import LiveBytes
from pecker_fast.account.memory.work import flops_of
from pecker_fast.engine import TrainState


class LiveMode(TorchDispatchMode):
    """Shows every tensor that an operation returns to a LiveBytes. What autograd keeps is alive like all else.

    flops: of all operations so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = LiveBytes(known)
        self.flops = 0

    def peak_since(self) -> int:
        """The peak so far; it starts again from what is alive now."""
        peak, self.live.peak = self.live.peak, self.live.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.live.see(tensor)
        return out


@dataclass
class Peak:
    """`bytes` is filled in when the block of `measured_peak` has ended."""

    bytes: int = 0


@contextlib.contextmanager
def measured_peak(device: torch.device, known: Iterable[Tensor] = ()) -> Iterator[Peak]:
    """Peak bytes inside the block: of tensors on the CPU, of CUDA's allocator on a GPU.

    known: what is alive when the block starts, see `alive`; a GPU knows by itself. On the CPU every operation is looked at,
    tens of microseconds each: for one or two iterations, not for a run. Scratch memory of kernels is not seen there.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with LiveMode(known) as mode:
        yield peak
    peak.bytes = mode.live.peak


def alive(state: TrainState) -> list[Tensor]:
    """What is alive between two iterations: weights, moments, averages, the bits of the mask, and gradients left over."""
    tensors = state_tensors(state)
    for optimizer in state.optimizers.values():
        bits = (optimizer._lanes_of(p, name).bits for name, p, _ in optimizer._named())
        tensors += [b for b in bits if b is not None]
    networks = state.networks_by_name.values()
    return [*tensors, *(p.grad for network in networks for _, p in network.named_parameters() if p.grad is not None)]
