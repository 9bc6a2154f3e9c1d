"""`salient_only` on ZeRO 1 and 2: what travels between ranks is salient, gradients one way and new weights the other."""

from __future__ import annotations

import torch
from pecker_kernels import MaskedAdam, SaliencyMask
from pecker_kernels.adam.lanes import Lanes
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor

from pecker_fast.engine.zero.network import Gradient, Sharded
from pecker_fast.forgetting import Gradients
from pecker_fast.machine.ranks import Ranks


class CompactExchange:
    """Moves k = N · density values of θ instead of N: 4k(W−1)/W bytes for the gradients, as much for the new weights.

    In these stages a rank's vector is a stretch of all weights in their order, so its salient ones are a stretch of all
    salient ones. A reduce-scatter and an all-gather of unequal stretches, each written as an all-to-all; the sum is taken in
    rank order. DeepSpeed's own reducer and step have no part in it.
    """

    def __init__(self, network: Sharded, mask: SaliencyMask, ranks: Ranks) -> None:
        self.network, self.mask, self.ranks = network, mask, ranks
        own = mask.clone()
        self.lanes = {name: Lanes.of(own, name, p.device) for name, p in network.parameters.items()}
        self.here = Lanes.of(network.shards.cut(mask), PARTITION, network.partition.device)
        self.counts = ranks.everyones(self.here.count)

        kept = {name: mask.bool(name).reshape(-1) for name in {piece.name for piece in network.shards.pieces}}
        self.of_pieces = [
            (piece.name, int(kept[piece.name][piece.start : piece.stop].sum())) for piece in network.shards.pieces
        ]

    def by_tensor(self, mean: Tensor) -> list[Gradient]:
        """(name, its part) of what `mean` returned."""
        parts = mean.split([count for _, count in self.of_pieces])
        return [(name, part) for (name, _), part in zip(self.of_pieces, parts)]

    def flat(self, gradients: Gradients) -> Tensor:
        """float32 [k] of gradients by parameter, whole, compact or missing."""
        parts = []
        for g, lanes in zip(gradients, self.lanes.values()):
            if g is None:
                parts.append(torch.zeros(lanes.count, device=self.network.denoiser.device))
            elif g.shape == lanes.shape:
                parts.append(lanes.gather(g).reshape(-1).float())
            else:
                parts.append(g.reshape(-1).float())
        return torch.cat(parts)

    def mean(self, flat: Tensor) -> Tensor:
        """[k_r]: the ranks' mean gradient of the salient weights that live here, where they live."""
        mine = self.counts[self.ranks.rank]
        if self.ranks.world == 1:
            return flat.to(self.network.partition.device)
        received = flat.new_empty(self.ranks.world * mine)
        torch.distributed.all_to_all_single(received, flat, [mine] * self.ranks.world, self.counts)
        total = received[:mine].clone()
        for part in received[mine:].split(mine) if mine else ():
            total += part
        return total.div_(self.ranks.world).to(self.network.partition.device)

    @torch.no_grad()
    def step(self, optimizer: MaskedAdam, mean: Tensor) -> None:
        """One step here on the mean gradient; all ranks get the weights it moved."""
        partition = self.network.partition
        partition.grad = None
        optimizer.step(compact_grads={PARTITION: mean})
        moved = self.here.gather(partition.detach()).reshape(-1).to(self.network.denoiser.device)
        if self.ranks.world > 1:
            every = moved.new_empty(sum(self.counts))
            sizes = [moved.numel()] * self.ranks.world
            torch.distributed.all_to_all_single(every, moved.repeat(self.ranks.world), self.counts, sizes)
            moved = every
        parts = moved.split([lanes.count for lanes in self.lanes.values()])
        for p, lanes, values in zip(self.network.parameters.values(), self.lanes.values(), parts):
            lanes.scatter_(p.data, values.view(p.shape) if lanes.bits is None else values)
