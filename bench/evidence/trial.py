"""One run of one arm: state, iterations, figures. Weights are judged as they would be exported (averaged)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import log2
from typing import Any

import torch
from pecker_kernels import SaliencyMask, SaliencyScores
from torch import Tensor

from evidence.plan import BATCH_SIZE, RELEARN_STEPS, TILE, UA_BAR, Arm, Config
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.engine.state import start_ema
from pecker_fast.errors import PeckerError
from pecker_fast.evaluate.metrics import fid
from pecker_fast.forgetting import SaliencyPass
from pecker_fast.forgetting.methods import get_method
from pecker_fast.forgetting.samplers import one_step_sample
from pecker_fast.forgetting.updates import Dense, adam
from pecker_fast.loading.parts import Parts, load_parts
from pecker_fast.networks.denoiser import Denoiser
from pecker_fast.recipe import Recipe, load_recipe
from pecker_fast.runs.loop import iteration

FORGET_SAMPLES, RETAIN_SAMPLES = 500, 1000
BACK = 0.5  # accuracy on the forgotten class at which it counts as back
EMA = 0.99
RELEARN_RATES = Config(4e-5, 3e-3, 1.0, 0)  # the demo's rates, for every arm


def recipe_of(arm: Arm, config: Config, pair: tuple[int, int], seed: int) -> Recipe:
    """The recipe a user would write for this run."""
    keys = [
        f"forget={pair[0]}", f"cover={pair[1]}", f"seed={seed}", f"batch_size={BATCH_SIZE}", f"ema={EMA}", "alpha=1.0",
        f"lr.generator={config.lr}", f"lr.score={config.lr_score}", f"lr.warmup={config.warmup}", f"weights.forget={config.forget}",
        f"mask.samples={arm.samples}", f"mask.structure={arm.structure}", f"mask.tile=[{TILE[0]},{TILE[1]}]",
        f"generator={'digits' if arm.start == 'two-stage' else 'null'}",
    ]  # fmt: skip
    if arm.score == "none":
        keys += ["mask.source=none"]
    else:
        keys += [f"mask.density={arm.density}", f"update_rule={arm.rule}"]
        keys += ["mask.source=random"] if arm.score == "random" else []
        keys += (
            [f"mask.score={arm.loss}", f"mask.contrast={str(arm.contrast).lower()}"] if arm.score != "random" else []
        )
    return load_recipe("digits_plain", keys)


@lru_cache(maxsize=10)
def _scores(arm: Arm, pair: tuple[int, int], seed: int) -> SaliencyScores:
    """Scores of `arm`, of which structure, density and rule do not matter."""
    recipe = recipe_of(arm, RELEARN_RATES, pair, seed)
    parts = load_parts(recipe)
    passes = SaliencyPass(recipe, parts.teacher, parts.score, parts.generator, parts.conditions)
    scores = passes.scores("forget", recipe.mask.reduction)
    if arm.contrast:
        passes.contrast_(scores, passes.scores("retain", "square"))
    return scores


def mask_of(recipe: Recipe, arm: Arm, pair: tuple[int, int], seed: int, generator: Denoiser) -> SaliencyMask | None:
    """What `SaliencyPass.mask` gives for the recipe, from shared scores."""
    shape: dict[str, Any] = {"structure": arm.structure, "tile": TILE, "density": arm.density}
    if arm.score == "none":
        return None
    if arm.score == "random":
        return SaliencyMask.random(generator.named_parameters(), seed=1000 + seed, **shape)
    shared = replace(arm, structure="element", density=0.5, rule="differentiated")  # arms of one score share it
    return SaliencyMask.from_scores(_scores(shared, pair, seed), **shape)


class Trial:
    """A run that can be judged and taken further."""

    def __init__(self, arm: Arm, config: Config, pair: tuple[int, int], seed: int) -> None:
        self.arm, self.config, self.pair, self.seed = arm, config, pair, seed
        self.recipe = recipe_of(arm, config, pair, seed)
        self.parts: Parts = load_parts(self.recipe)
        parts, named = self.parts, self.parts.generator.named_parameters()
        self.mask = mask_of(self.recipe, arm, pair, seed, parts.generator)
        self.state = TrainState(
            parts.teacher, parts.score, parts.generator,
            adam(self.recipe, parts.score.named_parameters(), config.lr_score),
            get_method("pecker").updates(self.recipe, named, self.mask), start_ema(parts.generator, EMA),
        )  # fmt: skip
        self.engine = LocalEngine(self.recipe, parts.conditions, torch.device("cpu"))
        self.diverged = False

    def advance(self, steps: int) -> None:
        """Iterate until `steps`. A run whose gradients or images are no longer finite has diverged and stays so."""
        try:
            while self.state.step < steps and not self.diverged:
                iteration(self.engine, self.state)
        except PeckerError:
            self.diverged = True

    @property
    def rate(self) -> float:
        """θ's learning rate of the last iteration."""
        return float(next(iter(self.state.updates.optimizers.values())).param_groups[0]["lr"])

    def figures(self, forget: int = FORGET_SAMPLES, retain: int = RETAIN_SAMPLES) -> dict[str, float]:
        """UA, cover rate, retain accuracy and FID of the averaged weights; a diverged run has FID infinity, UA 0."""
        failed = {"ua": 0.0, "cover": 0.0, "accuracy": 0.0, "fid": float("inf")}
        if self.diverged:
            return {"step": self.state.step, **failed}
        generator = self.state.averaged_generator()
        seen, _ = self._judged(generator, torch.full((forget,), self.pair[0]), 11)
        result = {"step": self.state.step, "ua": _share(seen != self.pair[0]), "cover": _share(seen == self.pair[1])}
        if retain:
            classes = torch.tensor(self.parts.conditions.retain)
            labels = classes[torch.arange(retain) % len(classes)]
            seen, features = self._judged(generator, labels, 12)
            if not bool(features.isfinite().all()):
                return {"step": self.state.step, **failed}
            real = self.parts.reference.select(self.parts.conditions.retain).features
            result |= {"accuracy": _share(seen == labels), "fid": fid(real, features)}
        return result

    def _judged(self, generator: Denoiser, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        images = one_step_sample(generator, labels, seed, self.recipe.timesteps.init)
        features, logits = self.parts.judge.judge(images)
        return logits.argmax(1), features

    def relearn(self, every: int = 10) -> int | None:
        """Iterations of plain distillation of all classes (no mask, no forgetting, the same rates for every arm) until
        the forgotten class is drawn again; None = not within the budget."""
        if self.diverged:
            return None
        state, named = self.state, self.state.generator.named_parameters()
        recipe = recipe_of(Arm("none"), RELEARN_RATES, self.pair, self.seed)
        generator = state.averaged_generator()
        for p, (_, q) in zip((p for _, p in named), generator.named_parameters()):
            p.data.copy_(q)
        relearning = TrainState(
            state.teacher, state.score, state.generator,
            adam(recipe, state.score.named_parameters(), recipe.lr.score), Dense(recipe, named, None), None, stage="distill",
        )  # fmt: skip
        engine = LocalEngine(recipe, self.parts.conditions, torch.device("cpu"))
        self.state = relearning
        for step in range(0, RELEARN_STEPS + 1, every):
            try:
                while relearning.step < step:
                    iteration(engine, relearning)
                if self.figures(retain=0)["ua"] <= 1 - BACK:
                    return step
            except PeckerError:
                return None
        return None


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def objective(figures: dict[str, float], start_fid: float) -> float:
    """Lower is better: doublings of the retain FID, plus what is missing of UA 99 % (five times) and of cover 90 %."""
    missing = 5 * max(0.0, UA_BAR - figures["ua"]) + max(0.0, 0.9 - figures["cover"])
    return missing + log2(figures["fid"] / start_fid)
