"""Bytes that collectives send, counted where torch dispatches them: exact, and the same whatever the network."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Inside, `sent` counts what this rank sends of floating-point tensors, by collective; `control` the rest.

    Sent by a ring, averaged over the ranks: an all-reduce of n bytes 2n(W−1)/W; a broadcast or reduce, a reduce-scatter of n,
    an all-gather into n: n(W−1)/W; an all-to-all what goes to others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.control = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
            if tensors:
                sent = self._bytes(name, args)
                if all(t.is_floating_point() for t in tensors):
                    self.sent[name] += sent
                else:
                    self.control += sent
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _bytes(name: str, args: Any) -> float:
        w, rank = dist.get_world_size(), dist.get_rank()
        share = (w - 1) / w
        if name == "alltoall_base":
            own = args[4][rank] if args[4] else args[1].shape[0] // w
            return float(args[1].nbytes - own * args[1].element_size())
        if name == "allgather_base":
            return args[0].nbytes * share
        if name == "allgather":
            return sum(t.nbytes for t in args[1]) * (w - 1)
        if name == "reduce_scatter_base":
            return args[1].nbytes * share
        if name == "reduce_scatter":
            return sum(t.nbytes for each in args[1] for t in each) * share
        total = sum(t.nbytes for t in args[0]) if isinstance(args[0], list | tuple) else args[0].nbytes
        return (2 if name == "allreduce" else 1) * total * share

    @property
    def total(self) -> float:
        return sum(self.sent.values())
