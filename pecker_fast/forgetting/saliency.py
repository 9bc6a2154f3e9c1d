"""Which weights carry the concept: gradient scores over the forget set, and the mask cut from them (PECKER Eq. 8-10)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pecker_kernels import SaliencyMask, SaliencyScores
from torch import Size, Tensor
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.contrast import check_left, contrasts_losses
from pecker_fast.forgetting.excluded import excluded, share_of_rest, with_excluded
from pecker_fast.forgetting.losses import generate, noise_loss, share_left
from pecker_fast.forgetting.methods import get_method
from pecker_fast.forgetting.objective import Networks, Objective
from pecker_fast.forgetting.pool import Pool
from pecker_fast.forgetting.samplers import ddim
from pecker_fast.networks import Denoiser, pair_x0
from pecker_fast.recipe import Recipe

CONTRAST_FLOOR = 1e-3  # share of the mean of the kept gradients that is added to them
ForgetImages = Callable[[Tensor, int], Tensor]  # (labels [N], batch index) -> images [N, C, H, W] in [-1, 1]


@dataclass
class SaliencyPass:
    """Samples of a branch through θ, which is only differentiated, never written; and the mask cut from its gradients.

    step numbers the refresh, so that each one draws fresh samples. forget_images serves `mask.data=PATH`; poll is called
    before every batch and may raise.
    """

    recipe: Recipe
    teacher: Denoiser
    score: Denoiser | None  # of methods that have one
    generator: Denoiser
    conditions: Conditions
    step: int = 0
    forget_images: ForgetImages | None = None
    poll: Callable[[], object] = lambda: None
    pool: Pool | None = None

    @property
    def objective(self) -> Objective:
        return get_method(self.recipe.method)

    @property
    def networks(self) -> Networks:
        return Networks(self.teacher, self.score, self.generator)

    def mask(self) -> SaliencyMask | None:
        """The recipe's mask over the generator's weights; None for `mask.source=none`. Raises RecipeError for a contrast with
        noise."""
        options = self.recipe.mask
        if options.source == "none":
            return None
        if options.source == "names":
            every = SaliencyMask.full(self.masked())
            whole = SaliencyMask(every.bits, every.shapes, structure="tensor")
            return with_excluded(whole, self._shapes())
        if options.source == "random":
            seed = draws.generator(self.recipe.seed, "random-mask", self.step).initial_seed()
            mask = SaliencyMask.random(self.masked(), density=self._density(), seed=seed, **self._shape())
            return with_excluded(mask, self._shapes())
        if contrasts_losses(self.recipe):
            self.check_contrast()
        return self.salient()

    def masked(self) -> list[tuple[str, Tensor]]:
        """Of `weights` those that may be in the mask."""
        weights = self.weights()
        left_out = excluded(self.recipe, [name for name, _ in weights], self.generator)
        return [(name, tensor) for name, tensor in weights if name not in left_out]

    def _shapes(self) -> list[tuple[str, Size]]:
        return [(name, tensor.shape) for name, tensor in self.weights()]

    def _density(self) -> float:
        """Among the weights that may be in the mask."""
        total, rest = (sum(tensor.numel() for _, tensor in found) for found in (self.weights(), self.masked()))
        return share_of_rest(self.recipe, total, rest)

    def _shape(self) -> dict[str, Any]:
        """What of the recipe says which weights stay together."""
        options = self.recipe.mask
        return {"structure": options.structure, "tile": tuple(options.tile), "scope": options.scope}

    def salient(self) -> SaliencyMask:
        """The mask of `mask.source=saliency`."""
        options = self.recipe.mask
        scores = self.scores("forget", options.reduction)
        if options.contrast:
            self.contrast_(scores, self.scores("retain", "square"))
        amount = {"density": self._density()} if options.threshold is None else {"threshold": options.threshold}
        return with_excluded(self.cut(scores, **amount, **self._shape()), self._shapes())

    def scores(self, branch: str, reduction: str) -> SaliencyScores:
        """Scores of ∇_θ ℓ over `mask.samples` samples of the branch.

        ℓ is the noise-prediction error ε_θ on x_t (score: mse, Eq. 8) or the generator's own loss (score: forget_loss).
        """
        named = self.generator.named_parameters()
        scores = SaliencyScores(self.masked(), reduction=reduction)
        batches = batches_of(self.recipe)
        for index in range(batches):
            self.poll()
            for _, p in named:
                p.grad = None
            with self.passing():
                self.batch_loss(branch, index).backward()
            scores.accumulate(last=index == batches - 1)
        for _, p in named:
            p.grad = None
        return scores

    def weights(self) -> list[tuple[str, Tensor]]:
        """(name, tensor of its shape) of what a mask speaks of."""
        return list(self.generator.named_parameters())

    def check_contrast(self) -> None:
        """Raise RecipeError where the retain gradient is rounding noise: looked at in one batch, before the pass."""
        recipe, batch, score = self.recipe, self._batch("retain", 0), self.score
        assert score is not None
        with torch.no_grad():
            x_g = generate(self.generator, batch.z, batch.c_g, recipe.timesteps.init)
        x_g.requires_grad_(True)
        with self.passing():
            x_t = self.teacher.schedule.add_noise(x_g, batch.e, batch.t)
            with torch.set_grad_enabled(not recipe.detach_score):
                f_teacher, f_score = pair_x0(
                    self.teacher, score, x_t, batch.t, batch.c_p, batch.c_s, recipe.guidance.teacher,
                    recipe.guidance.score,
                )  # fmt: skip
            check_left(recipe, share_left(x_g, f_teacher, f_score, recipe.alpha))

    def contrast_(self, scores: SaliencyScores, retain: SaliencyScores) -> None:
        """Divide the scores by those of the kept samples."""
        scores.contrast_(retain, floor=CONTRAST_FLOOR)

    def cut(self, scores: SaliencyScores, **choice: Any) -> SaliencyMask:
        """choice: as for SaliencyMask.from_scores."""
        return SaliencyMask.from_scores(scores, **choice)

    def passing(self) -> AbstractContextManager[None]:
        """What ℓ is made and differentiated in: gradients go through ψ, not to its weights. Both, because checkpointing passes
        forward again on the way back."""
        return nullcontext() if self.score is None else self.score.frozen()

    def batch_loss(self, branch: str, index: int) -> Tensor:
        """ℓ over batch number `index` of the pass, inside `passing`."""
        batch = self._batch(branch, index)
        if not self.recipe.one_step:
            return self.loss(self._user_batch(batch, branch, index), branch)
        return self.loss(batch, branch, lambda: self._images(batch, branch, index))

    def _user_batch(self, batch: Batch, branch: str, index: int) -> Batch:
        """The batch with x_t of the user's own images of what is forgotten (`mask.data=PATH`), where there are any."""
        if branch != "forget" or self.forget_images is None:
            return batch
        x_0 = self.forget_images(batch.c_g, index).to(batch.z)
        return replace(batch, z=self.generator.schedule.add_noise(x_0, batch.e, batch.t_g))

    def _batch(self, branch: str, index: int) -> Batch:
        """The draws of a batch."""
        recipe, generator, n = self.recipe, self.generator, self.recipe.batch_size
        rng = draws.generator(recipe.seed, f"saliency-{branch}-{self.step}", index, generator.device)
        c_g, c_p = self.conditions.draw(branch, n, rng)
        z = torch.randn(n, *generator.sample_shape, generator=rng, device=rng.device)
        e = torch.randn(z.shape, generator=rng, device=rng.device)
        t = self._timesteps(n, rng)
        batch = Batch(z, torch.full_like(t, recipe.timesteps.init), e, t, c_g, c_g, c_p)
        return self.objective.draw(recipe, batch, branch, self.networks, self.pool, rng)

    def loss(self, batch: Batch, branch: str, images: Callable[[], Tensor] | None = None) -> Tensor:
        """ℓ over given draws, inside `passing`. images: x_0 [N, C, H, W] for the noise-prediction error of a one-step generator;
        None = samples of θ. A model of many steps has x_t in its draws."""
        recipe, generator, t_init = self.recipe, self.generator, self.recipe.timesteps.init
        if recipe.mask.score == "forget_loss":
            out = self.objective.forward(recipe, generator, batch)
            return self.objective.loss(recipe, self.networks, out, batch, [branch]).mean()
        if not recipe.one_step:
            return noise_loss(generator.eps, batch.z, batch.e, batch.t_g, batch.c_g).mean()
        with torch.no_grad():
            x_0 = images() if images is not None else generate(generator, batch.z, batch.c_g, t_init)
        x_t = generator.schedule.add_noise(x_0, batch.e, batch.t)
        return noise_loss(generator.eps, x_t, batch.e, batch.t, batch.c_g).mean()

    def _timesteps(self, n: int, rng: torch.Generator) -> Tensor:
        """[n] timesteps of the loss; the generator's own loss is only defined on the training range."""
        recipe = self.recipe
        if recipe.mask.timesteps == "init":
            return torch.full((n,), recipe.timesteps.init, device=rng.device)
        if recipe.mask.timesteps == "train" or recipe.mask.score == "forget_loss":
            low, high = recipe.timesteps.min, recipe.timesteps.max
        else:
            low, high = 0, self.teacher.schedule.num_timesteps
        return torch.randint(low, high, (n,), generator=rng, device=rng.device)

    def _images(self, batch: Batch, branch: str, index: int) -> Tensor:
        """x_0 [N, C, H, W] of the noise-prediction error: samples of θ, of the teacher, or the user's own images."""
        recipe, c = self.recipe, batch.c_g
        if branch == "forget" and self.forget_images is not None:
            return self.forget_images(c, index).to(batch.z.device)
        if recipe.mask.data == "teacher":
            seed = draws.generator(recipe.seed, f"saliency-teacher-{branch}-{self.step}", index).initial_seed()
            steps, guidance = recipe.evaluate.teacher_steps, recipe.guidance.teacher
            return torch.cat(list(ddim(self.teacher, c, steps, seed, guidance=guidance)))
        if recipe.mask.data == "pseudo" or branch == "retain":
            return generate(self.generator, batch.z, c, recipe.timesteps.init)
        raise RecipeError(f"mask.data: {recipe.mask.data!r} needs images to be loaded first")

    def flops(self) -> float:
        """FLOPs of `mask`: one batch is made again and counted, all cost the same.

        Counting every batch would take more time than the mask itself, where networks are small.
        """
        recipe = self.recipe
        if not recipe.uses_mask or recipe.mask.source != "saliency":
            return 0.0
        one = recipe.model_copy(update={"mask": recipe.mask.model_copy(update={"samples": recipe.batch_size})})
        with FlopCounterMode(display=False) as counter:
            replace(self, recipe=one).salient()
        return float(counter.get_total_flops() * batches_of(recipe))


def batches_of(recipe: Recipe) -> int:
    """Batches of the saliency pass."""
    return max(1, round(recipe.mask.samples / recipe.batch_size))
