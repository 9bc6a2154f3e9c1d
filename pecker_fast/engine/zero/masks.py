"""The saliency pass over ranks: whole batches on each, summed in the order of the batches where the weights live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from pecker_kernels import SaliencyMask, SaliencyScores, Shards
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor

from pecker_fast.conditions import Conditions
from pecker_fast.engine.zero.state import ZeroState
from pecker_fast.forgetting import CONTRAST_FLOOR, ForgetImages, SaliencyPass, batches_of
from pecker_fast.machine.ranks import Ranks
from pecker_fast.recipe import Recipe

BUCKET = 1 << 24  # elements that travel at once


class ShardedPass(SaliencyPass):
    """The pass over ranks, outside DeepSpeed's reducer: bit for bit the mask of one process, whole on every rank. Takes all
    ranks.

    A batch is the recipe's `batch_size` however many ranks there are, and one rank's work; rank r does batches r, r + W, ….
    Every rank then adds up, for its own weights, the gradients of all batches in their order: sums that do not depend on
    how many ranks there are. A rank holds one gradient of the whole network while it does.
    """

    def __init__(
        self,
        recipe: Recipe,
        state: ZeroState,
        conditions: Conditions,
        ranks: Ranks,
        forget_images: ForgetImages | None = None,
        poll: Callable[[], object] = lambda: None,
    ) -> None:
        networks = (state.teacher, state.score, state.generator)
        super().__init__(recipe, *networks, conditions, state.step, forget_images, poll, state.pool)
        self.ranks, self.network = ranks, state.networks["generator"]

    @cached_property
    def layouts(self) -> list[Shards]:
        """Where every rank's weights lie."""
        here = self.network.shards
        return [Shards(here.shapes, *theirs) for theirs in self.ranks.everyones((here.pieces, here.length))]

    def weights(self) -> list[tuple[str, Tensor]]:
        return [(name, torch.empty(1).expand(size)) for name, size in self.network.shards.shapes.items()]

    def check_contrast(self) -> None:
        self.ranks.agree(super().check_contrast)

    @cached_property
    def shards(self) -> Shards:
        """Of the weights that may be in the mask; all else is padding to it."""
        whole, names = self.network.shards, {name for name, _ in self.masked()}
        shapes = {name: shape for name, shape in whole.shapes.items() if name in names}
        return Shards(shapes, [piece for piece in whole.pieces if piece.name in names], whole.length)

    def contrast_(self, scores: SaliencyScores, retain: SaliencyScores) -> None:
        self.shards.contrast_(scores, retain, floor=CONTRAST_FLOOR)

    def cut(self, scores: SaliencyScores, **choice: Any) -> SaliencyMask:
        return self.shards.mask(scores, **choice)

    def scores(self, branch: str, reduction: str) -> SaliencyScores:
        """Of this rank's weights."""
        world, batches = self.ranks.world, batches_of(self.recipe)
        scores = self.network.shards.scores(self.generator.device, reduction)
        parameters = list(self.network.parameters.values())
        for first in range(0, batches, world):
            self.poll()
            mine = min(first + self.ranks.rank, batches - 1)  # the last round may have ranks to spare: they go along
            with self.passing():
                grads = torch.autograd.grad(self.batch_loss(branch, mine), parameters, allow_unused=True)
            done = min(world, batches - first)
            self._add(scores, grads, done)
            scores.counted(done)
        return scores

    def _add(self, scores: SaliencyScores, grads: tuple[Tensor | None, ...], ranks: int) -> None:
        """Add the gradients of the first `ranks` ranks, in their order, to the scores of the weights that live here."""
        shards = self.network.shards
        for bucket in self._buckets(grads):
            mine = [piece for name in bucket for piece in shards.pieces_of(name)]
            sizes = [piece.numel for piece in mine]
            for received in self._exchanged(bucket, sum(sizes))[:ranks]:
                for piece, values in zip(mine, received.split(sizes)):
                    scores.add_part(PARTITION, piece.offset, values)

    def _exchanged(self, bucket: dict[str, Tensor], here: int) -> list[Tensor]:
        """Of each rank's bucket, in rank order, what belongs here: float32 [here], piece by piece."""
        none = torch.empty(0, device=self.generator.device)
        sent = [
            torch.cat([none, *(values for name, g in bucket.items() for _, values in to.owned(name, g))])
            for to in self.layouts
        ]
        if self.ranks.world == 1:
            return sent
        received = none.new_empty(here * self.ranks.world)
        torch.distributed.all_to_all_single(
            received, torch.cat(sent), [here] * self.ranks.world, [part.numel() for part in sent]
        )
        return list(received.view(self.ranks.world, here).unbind())

    def _buckets(self, grads: tuple[Tensor | None, ...]) -> Iterator[dict[str, Tensor]]:
        """Gradients as flat float32, some at a time, the same ones on every rank; a missing one is zero."""
        bucket: dict[str, Tensor] = {}
        for (name, size), grad in zip(self.network.shards.shapes.items(), grads):
            bucket[name] = (
                grad.float().reshape(-1)
                if grad is not None
                else torch.zeros(size.numel(), device=self.generator.device)
            )
            if sum(t.numel() for t in bucket.values()) >= BUCKET:
                yield bucket
                bucket = {}
        if bucket:
            yield bucket
