"""The saliency pass over ranks: whole batches on each, summed in the order of the batches where the weights live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pecker_kernels import SaliencyMask, SaliencyScores, Shards
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.engine.zero.state import ZeroState
from pecker_fast.forgetting import ForgetImages, batch_loss, batches_of
from pecker_fast.machine.ranks import Ranks
from pecker_fast.recipe import Recipe

BUCKET = 1 << 24  # elements that travel at once


def make_sharded_mask(
    recipe: Recipe,
    state: ZeroState,
    conditions: Conditions,
    ranks: Ranks,
    forget_images: ForgetImages | None,
    poll: Callable[[], object],
) -> SaliencyMask | None:
    """saliency.make_mask over ranks: bit for bit the mask of one process, whole on every rank. Takes all ranks."""
    options, shards = recipe.mask, state.networks["generator"].shards
    if options.source == "none":
        return None
    shape: dict[str, Any] = {"structure": options.structure, "tile": tuple(options.tile), "scope": options.scope}
    if options.source == "random":
        seed = draws.generator(recipe.seed, "random-mask", state.step).initial_seed()
        stand_ins = {name: torch.empty(1).expand(size) for name, size in shards.shapes.items()}
        return SaliencyMask.random(stand_ins, density=options.density, seed=seed, **shape)
    passes = Passes(recipe, state, conditions, ranks, poll)
    scores = passes.scores("forget", options.reduction, forget_images)
    if options.contrast:
        shards.contrast_(scores, passes.scores("retain", "square", None), floor=1e-3)
    if options.threshold is not None:
        return shards.mask(scores, threshold=options.threshold, **shape)
    return shards.mask(scores, density=options.density, **shape)


class Passes:
    """Passes of forget and retain samples through θ, outside DeepSpeed's reducer.

    A batch is the recipe's `batch_size` however many ranks there are, and one rank's work; rank r does batches r, r + W, ….
    Every rank then adds up, for its own weights, the gradients of all batches in their order: sums that do not depend on
    how many ranks there are. A rank holds one gradient of the whole network while it does.
    """

    def __init__(
        self, recipe: Recipe, state: ZeroState, conditions: Conditions, ranks: Ranks, poll: Callable[[], object]
    ) -> None:
        self.recipe, self.state, self.conditions, self.ranks, self.poll = recipe, state, conditions, ranks, poll
        self.network = state.networks["generator"]
        self.layouts: list[Shards] = [
            Shards(self.network.shards.shapes, pieces, length)
            for pieces, length in ranks.everyones((self.network.shards.pieces, self.network.shards.length))
        ]

    def scores(self, branch: str, reduction: str, forget_images: ForgetImages | None) -> SaliencyScores:
        """saliency.saliency_scores of this rank's weights."""
        state, world, batches = self.state, self.ranks.world, batches_of(self.recipe)
        scores = self.network.shards.scores(state.generator.device, reduction)
        parameters = list(self.network.parameters.values())
        for first in range(0, batches, world):
            self.poll()
            mine = min(first + self.ranks.rank, batches - 1)  # the last round may have ranks to spare: they go along
            loss = batch_loss(
                self.recipe, state.teacher, state.score, state.generator, self.conditions, branch, mine, state.step,
                forget_images,
            )  # fmt: skip
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
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
        none = torch.empty(0, device=self.state.generator.device)
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
                else torch.zeros(size.numel(), device=self.state.generator.device)
            )
            if sum(t.numel() for t in bucket.values()) >= BUCKET:
                yield bucket
                bucket = {}
        if bucket:
            yield bucket
