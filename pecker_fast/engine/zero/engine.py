"""Many processes: θ and ψ on DeepSpeed ZeRO, every rank with its share of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from pecker_kernels import MaskedAdam, SaliencyMask
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor

from pecker_fast.conditions import Conditions
from pecker_fast.engine.finite import are_gradients, non_finite
from pecker_fast.engine.inputs import Inputs
from pecker_fast.engine.live import LiveBackward
from pecker_fast.engine.local import LocalEngine
from pecker_fast.engine.pieces import split, total
from pecker_fast.engine.state import TrainState
from pecker_fast.engine.zero.compact import CompactExchange
from pecker_fast.engine.zero.masks import ShardedPass
from pecker_fast.engine.zero.network import Gradient, Sharded, gathered
from pecker_fast.engine.zero.settings import check_recipe, deepspeed_settings, initialize, require_deepspeed
from pecker_fast.engine.zero.state import ZeroState, partition_average, take_average
from pecker_fast.forgetting import Attack, Batch, Dense, ForgetImages, SaliencyPass, adam
from pecker_fast.machine import part
from pecker_fast.machine.ranks import Ranks
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe


class ZeroEngine(LocalEngine):
    """The iteration of LocalEngine with two DeepSpeed engines under it.

    Draws are those of one process: each rank takes its slice. The frozen ψ is called as a plain module, since DeepSpeed's
    own door would give it gradients. Gradients of branches the mask limits are masked on every rank before they meet others,
    and before any reduction. Raises RecipeError for what the engine does not do.
    """

    sharded = True

    def __init__(self, recipe: Recipe, conditions: Conditions, device: torch.device, ranks: Ranks) -> None:
        require_deepspeed()
        check_recipe(recipe, ranks.world)
        super().__init__(recipe, conditions, device, late=False, ranks=ranks)
        # what DeepSpeed reduces are gradients of all weights; only where we reduce them ourselves can some be left out
        self.compact_rule = recipe.engine.zero < 3 and recipe.facts.masked and recipe.update_rule == "salient_only"
        self.live = LiveBackward(recipe.mask.skip and self.compact_rule)
        self.exchange: CompactExchange | None = None
        self.settings = deepspeed_settings(recipe, ranks.world)
        share = recipe.batch_size // ranks.world
        self.share = slice(ranks.rank * share, (ranks.rank + 1) * share)

    # -- the stages of a run ----------------------------------------------------------------------------------------

    def start(self, teacher: Denoiser, score: Denoiser | None, generator: Denoiser, stage: str = "forget") -> ZeroState:
        trained = ([] if score is None else [("score", score)]) + [("generator", generator)]
        networks = {name: Sharded(network.to(self.device), self.settings) for name, network in trained}
        if self.recipe.engine.shard_teacher:
            engine = initialize(model=teacher.clone().freeze().unet, config=self.settings)
            teacher = teacher.with_network(engine.module).freeze()
        return ZeroState(
            teacher.to(self.device), networks["score"].denoiser if score is not None else None,
            networks["generator"].denoiser, self._score_optimizer(networks),
            Dense(self.recipe, networks["generator"].named_partition, None),
            partition_average(networks["generator"], self.recipe), stage=stage, networks=networks,
        )  # fmt: skip

    def _score_optimizer(self, networks: dict[str, Sharded]) -> MaskedAdam | None:
        if "score" not in networks:
            return None
        return adam(self.recipe, networks["score"].named_partition, self.recipe.lr.score)

    def forget_stage(self, state: TrainState) -> ZeroState:
        state = cast(ZeroState, state)
        generator = state.networks["generator"]
        if state.stage == "distill" and state.ema is not None:
            take_average(generator, state.ema[PARTITION])
        state.release()
        state.stage, state.step = "forget", 0
        state.score_optimizer = self._score_optimizer(state.networks)
        state.updates = Dense(self.recipe, generator.named_partition, None)
        state.ema = partition_average(generator, self.recipe)
        return state

    def follow(self, state: TrainState, mask: SaliencyMask | None) -> None:
        state = cast(ZeroState, state)
        network = state.networks["generator"]
        state.whole_mask = None if mask is None else mask.to(self.device)
        local = None if mask is None else network.shards.cut(mask)
        state.updates = self.objective.updates_of_sums(self.recipe, network.named_partition, local)

    def set_mask(self, state: TrainState, mask: SaliencyMask) -> None:
        state = cast(ZeroState, state)
        state.whole_mask = mask.to(self.device)
        state.updates.set_mask(state.networks["generator"].shards.cut(mask))

    def saliency_pass(
        self,
        state: TrainState,
        forget_images: ForgetImages | None = None,
        poll: Callable[[], object] = lambda: None,
    ) -> SaliencyPass:
        return ShardedPass(self.recipe, cast(ZeroState, state), self.conditions, self.ranks, forget_images, poll)

    @torch.no_grad()
    def averaged(self, state: TrainState) -> Denoiser | None:
        state = cast(ZeroState, state)
        network = state.networks["generator"]
        kinds = {name: p.dtype for name, p in network.parameters.items()}

        def with_average(name: str, weights: Tensor) -> Tensor:
            kept = weights.to(kinds[name])
            if state.ema is None:
                return kept
            average = network.shards.gather(state.ema[PARTITION], name)
            return torch.where(average == kept, kept, average.to(kept.dtype))

        return network.whole(self.ranks.is_first, with_average)

    def means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        if not losses:
            return {}
        every = torch.tensor(self.ranks.everyones([float(loss) for loss in losses.values()]), dtype=torch.float64)
        return dict(zip(losses, every.mean(0).tolist()))

    # -- the steps --------------------------------------------------------------------------------------------------

    def draw(self, state: TrainState, role: str, branch: str) -> Batch:
        return super().draw(state, role, branch).part(self.share)

    def own_vectors(self, network: Denoiser, c: Tensor) -> Tensor:
        table = getattr(network.unet, "class_embedding", None)
        with gathered([] if table is None else list(table.parameters()), self.recipe.engine.zero):
            return super().own_vectors(network, c)

    def share_of(self, attack: Attack) -> Attack:
        share = len(attack.codes) // self.ranks.world
        return attack.part(slice(self.ranks.rank * share, (self.ranks.rank + 1) * share))

    def sum_of(self, state: TrainState, gradient: Tensor) -> Tensor:
        if self.ranks.world > 1:
            torch.distributed.all_reduce(gradient)
        self._check(state, "adversary", [("values", gradient)])
        return gradient

    @contextmanager
    def score_update(self, state: TrainState, passes: int) -> Iterator[Callable[[Tensor], object]]:
        network = cast(ZeroState, state).networks["score"]
        with network.one_reduction(passes > 1):
            yield network.backward
        self._check(state, "score network", network.gradients())
        with part("score_optimizer"):
            assert state.score_optimizer is not None
            network.step(state.score_optimizer)

    def generator_update(
        self, state: TrainState, phase: tuple[str, ...], weights: dict[str, float], update: int, inputs: Inputs | None
    ) -> dict[str, Tensor]:
        network = cast(ZeroState, state).networks["generator"]
        if self.compact_rule and state.mask is not None:
            return self._compact_update(cast(ZeroState, state), phase, weights, inputs)
        whole = self.batches(state, "generator", weights, inputs)
        pieces = split(list(whole.values()), self.recipe.engine.micro_batch)
        separate = state.updates.separate and len(weights) > 1
        groups = [[branch] for branch in weights] if separate else [list(weights)]
        values: dict[str, list[Tensor]] = {}
        with network.one_reduction(len(pieces) * len(groups) > 1):
            for share, piece in pieces:
                shares = {branch: share * weight for branch, weight in weights.items()}
                ways, means = self.guide(state, dict(zip(whole, piece)), shares, groups, [None] * len(groups))
                for group, (x, dx) in zip(groups, ways):
                    mask = state.mask if state.updates.limits(group) else None
                    with part("generator_backward_" + "_".join(group)), network.masked_gradients(mask):
                        network.backward((x * dx).sum())
                for branch, mean in means.items():
                    values.setdefault(branch, []).append(share * mean)
        self._check(state, "generator", network.gradients())
        with part("generator_optimizer"):
            network.step(state.updates.optimizer_of(phase))
        return {("retain" if b == "all" else b) + "_loss": total(found) for b, found in values.items()}

    def _compact_update(
        self, state: ZeroState, phase: tuple[str, ...], weights: dict[str, float], inputs: Inputs | None
    ) -> dict[str, Tensor]:
        """`salient_only`: gradients of salient weights alone are made, reduced and stepped on."""
        network, mask = state.networks["generator"], state.mask
        assert mask is not None
        if self.exchange is None or self.exchange.mask is not mask or self.exchange.network is not network:
            self.exchange = CompactExchange(network, mask, self.ranks)
        with self.guard.ignored():  # what is not finite shows in the mean, where all ranks look
            gradients, losses = self.branch_gradients(state, weights, separate=False, inputs=inputs)
        with part("reduction"):
            mean = self.exchange.mean(self.exchange.flat(gradients["sum"]))
        self._check(state, "generator", self.exchange.by_tensor(mean))
        with part("generator_optimizer"):
            self.exchange.step(state.updates.optimizer_of(phase), mean)
        return losses

    def _check(self, state: TrainState, what: str, gradients: list[Gradient]) -> None:
        """Raise NonFiniteError on all ranks where one of them holds a gradient that is not finite."""
        with part("finite_check"):
            bad = not are_gradients([g for _, g in gradients])
            if not self.ranks.largest(int(bad)):
                return
        mine = next((name for name, g in gradients if not are_gradients([g])), None) if bad else None
        found = [(rank, name) for rank, name in enumerate(self.ranks.everyones(mine)) if name is not None]
        rank, name = found[0]
        where = f"{state.stage} step {state.step}, rank {rank}"
        raise self.ranks.shared(non_finite(where, f"{what} tensor {name}"))
