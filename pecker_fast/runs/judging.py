"""Judging a run: samplers of its networks, figures and image grids at fixed seeds, proof of what stayed untouched."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pecker_kernels import SaliencyMask
from torch import Tensor

from pecker_fast import files
from pecker_fast.conditions import shown_classes
from pecker_fast.errors import CheckpointError, Interrupted, ModelError
from pecker_fast.evaluate import Sampler, evaluate, fid_floor, share
from pecker_fast.forgetting import ddim_sample, grid_labels, one_step_sample, save_grid
from pecker_fast.loading import Model, start_generator
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe

GRID_COLUMNS = 8
GRID_SEED = 7
EVALUATION_SEED = 1_000_003  # apart from every training seed a user is likely to choose
TRIED = 48  # samples of each group that the teacher draws before training
Drawing = Callable[[], AbstractContextManager[object]]  # what every draw runs in, and may be left by
TRUSTED = 0.8  # share of its teacher's samples that a judge is expected to see as asked


class BaseJudging:
    """Samplers of one recipe's networks; every row of figures sees the same noise."""

    def __init__(self, recipe: Recipe, parts: Model, drawing: Drawing = nullcontext) -> None:
        self.recipe, self.parts, self.drawing = recipe, parts, drawing

    @property
    def possible(self) -> bool:
        """Whether there is a judge."""
        raise NotImplementedError

    def shares(self, sampler: Sampler, samples: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
        """`figures` without what compares distributions."""
        raise NotImplementedError

    def tried(self) -> dict[str, Any] | None:
        """UA and retain accuracy of a few samples of the teacher's own, and `doubts`; None where nothing is to be judged, or
        where the teacher cannot draw (its reference row says so)."""
        evaluate = self.recipe.evaluate
        wanted = max(evaluate.final, evaluate.samples if evaluate.every else 0)
        if not wanted or not self.possible:
            return None
        try:
            figures = self.shares(self.multi_step(), min(TRIED, wanted))
        except Interrupted:
            raise
        except Exception:  # of whatever kind: its reference row says so at the end
            return None
        return {key: figures[key] for key in ("ua", "retain_accuracy", "samples")} | {"doubts": self.doubts(figures)}

    def doubts(self, figures: dict[str, Any]) -> str | None:
        """One line where the judge does not see in the teacher's own samples what was asked for; None where it does.

        figures: `shares` of the teacher. A share counts as too low when its whole 95 % interval lies below `TRUSTED`.
        """
        found = []
        for key, group in (("ua", "forget"), ("retain_accuracy", "retain")):
            seen = share(figures, key)
            if seen is None:
                continue
            seen = seen.opposite() if key == "ua" else seen
            if seen.high < TRUSTED:
                found.append(f"{seen.text()} of its {group} samples")
        if not found:
            return None
        return (
            f"the judge sees what was asked for in only {' and '.join(found)}, {figures['samples']} of each drawn by the teacher "
            "in its own steps; figures made by it will mean little: give another judge (evaluate.judge), or a better teacher"
        )

    def one_step(self, generator: Denoiser) -> Sampler:
        return self._drawn(lambda labels, seed: one_step_sample(generator, labels, seed, self.recipe.timesteps.init))

    def of(self, generator: Denoiser) -> Sampler:
        """How a result of the recipe's method draws: in one step, or in many."""
        return self.one_step(generator) if self.recipe.one_step else self.multi_step(generator)

    def multi_step(self, network: Denoiser | None = None) -> Sampler:
        """A model's own sampler, DDIM; None = the teacher's, the reference row. It raises ModelError where the images are not
        finite."""
        steps, guidance = self.recipe.evaluate.teacher_steps, self.recipe.guidance.teacher
        whose = "the teacher's" if network is None else "the model's"

        def sample(labels: Tensor, seed: int) -> Tensor:
            images = ddim_sample(network or self.parts.teacher, labels, steps, seed, guidance=guidance)
            if not bool(images.isfinite().all()):
                raise ModelError(f"{whose} multi-step sampler drew images that are not finite")
            return images

        return self._drawn(sample)

    def _drawn(self, sampler: Sampler) -> Sampler:
        def sample(labels: Tensor, seed: int) -> Tensor:
            with self.drawing():
                return sampler(labels, seed)

        return sample


class Judging(BaseJudging):
    """Figures and grids over classes, by the judge beside the model."""

    @property
    def possible(self) -> bool:
        return self.parts.judge is not None

    def figures(self, sampler: Sampler, samples: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
        """UA, cover rate, retain figures of `samples` forget and `samples` retain images; see `evaluate`."""
        judge, c = self.parts.judge, self.parts.conditions
        assert judge is not None
        found = evaluate(sampler, judge, self.parts.reference, c.forget, c.cover, c.retain, samples, seed)
        return found | {"seed": seed}

    def shares(self, sampler: Sampler, samples: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
        """`figures` without what compares distributions."""
        judge, c = self.parts.judge, self.parts.conditions
        assert judge is not None
        return evaluate(sampler, judge, None, c.forget, c.cover, c.retain, samples, seed)

    def grid(self, sampler: Sampler, path: Path) -> Path:
        """A row of images for every forget and retain class (see `shown_classes`), equal noise in every grid of a run."""
        c = self.parts.conditions
        classes = shown_classes(c.forget, c.cover, c.retain)
        return save_grid(sampler(grid_labels(classes, GRID_COLUMNS), GRID_SEED), GRID_COLUMNS, path)

    def trust(self, teacher: dict[str, Any] | None) -> dict[str, Any] | None:
        """How far the judge itself can be trusted: its own accuracy, the teacher's as it sees it, real against real."""
        judge, reference = self.parts.judge, self.parts.reference
        if judge is None:
            return None
        real = reference.select(self.parts.conditions.retain) if reference is not None else None
        right = list((teacher or {}).get("per_class", {}).values())
        return {
            "held_out_accuracy": judge.info.get("held_out_accuracy"),
            "teacher_accuracy": sum(right) / len(right) if right else None,
            "fid_floor": fid_floor(real.features, real.labels, seed=0) if real is not None else None,
            "reference_samples": len(real) if real is not None else None,
        }


def _outside_sha256(network: Denoiser, mask: SaliencyMask) -> str:
    """sha256 over the weights that the mask leaves out, in named_parameters order."""
    return files.sha256_tensors(
        (name, p.detach().cpu()[~mask.bool(name).cpu()]) for name, p in network.named_parameters()
    )


def outside_mask(
    recipe: Recipe, teacher: Denoiser, mask: SaliencyMask | None, generator: Denoiser
) -> dict[str, Any] | None:
    """Proof that weights outside the mask are the start's: their sha256 before and after (`salient_only`, one mask); None where
    they may move. Raises CheckpointError where they have moved all the same."""
    if mask is None or recipe.update_rule != "salient_only" or recipe.mask.refresh or recipe.distill_steps:
        return None
    start = start_generator(recipe, teacher)  # φ is as it was loaded
    before, after = _outside_sha256(start, mask), _outside_sha256(generator, mask)
    if before != after:
        raise CheckpointError(
            f"weights outside the mask have changed ({before[:12]} is now {after[:12]}); please report this"
        )
    return {"weights": mask.total - mask.count, "before_sha256": before, "after_sha256": after}
