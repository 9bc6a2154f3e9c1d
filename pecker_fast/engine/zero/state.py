"""A train state whose weights are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pecker_kernels import MaskedAdam, SaliencyMask
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor

from pecker_fast.engine.state import TrainState
from pecker_fast.engine.zero.network import Sharded
from pecker_fast.recipe import Recipe


@dataclass
class ZeroState(TrainState):
    """φ, ψ, θ with optimizers and average over this rank's vector; the mask is whole on every rank."""

    networks: dict[str, Sharded] = field(default_factory=dict)  # "score", "generator"
    whole_mask: SaliencyMask | None = None

    @property
    def mask(self) -> SaliencyMask | None:
        return self.whole_mask

    def optimizers_of(self, network: str) -> dict[str, MaskedAdam]:
        """The optimizers by name of one network."""
        if network != "score":
            return self.updates.optimizers
        return {} if self.score_optimizer is None else {"score": self.score_optimizer}

    def _ema_pairs(self, ema: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [ema[PARTITION]], [self.networks["generator"].partition.detach()]


def partition_average(network: Sharded, recipe: Recipe) -> dict[str, Tensor] | None:
    """The moving average as it starts: of this rank's weights."""
    return {PARTITION: network.partition.detach().clone()} if recipe.ema > 0 else None


@torch.no_grad()
def take_average(network: Sharded, average: Tensor) -> None:
    """θ ← its average, on all ranks; a weight that never moved keeps its very bits."""
    partition = network.partition
    partition.copy_(torch.where(average == partition, partition, average))
    network.publish()
