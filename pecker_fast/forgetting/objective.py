"""What a method is to the engine: how samples of θ become a loss.

The chain rule is cut where θ ends: `forward` is all that θ is differentiated through, `loss` is differentiated to what came out
of it. So update rules, row skipping, pieces of batches and ZeRO do the same for every method.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pecker_kernels import SaliencyMask
from torch import Tensor, nn

from pecker_fast.conditions import Conditions
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.contrast import contrasts_losses
from pecker_fast.forgetting.losses import generate, generator_loss
from pecker_fast.forgetting.pool import Pool, along
from pecker_fast.forgetting.updates import RULES, Dense, DifferentiatedSum, UpdateRule
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe


@dataclass(frozen=True)
class Networks:
    """φ, ψ (None where a method has none) and θ."""

    teacher: Denoiser
    score: Denoiser | None
    generator: Denoiser


class Objective:
    """A method. pooled: of what each branch's images are drawn, see `asked_for`; empty = it has no pool. anchored:
    whether weights are held where they were by how much each matters to what is kept."""

    pooled: ClassVar[Mapping[str, str]] = {}
    anchored: ClassVar[bool] = False

    def pools(self, recipe: Recipe) -> Mapping[str, str]:
        """`pooled`, where the recipe has images that are there once and for all."""
        return {} if recipe.images.source == "trajectory" else self.pooled

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError, before anything is loaded, for what does not go together."""

    def updates(self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None) -> UpdateRule:
        """How gradients become an update of θ: by the recipe's rule under the mask, densely where there is none."""
        # of a LoRA student the mask is in the product
        rule = Dense if mask is None or recipe.student == "lora" else RULES[recipe.update_rule]
        return rule(recipe, named, mask)

    def updates_of_sums(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> UpdateRule:
        """As `updates`, for an engine that masks and adds up the branches' gradients before an optimizer sees them."""
        if mask is not None and recipe.update_rule == "differentiated":
            return DifferentiatedSum(recipe, named, mask)
        return self.updates(recipe, named, mask)

    def with_times(
        self, recipe: Recipe, teacher: Denoiser, pool: Pool, poll: Callable[[], object] = lambda: None
    ) -> Pool:
        """The pool with how often its timesteps are drawn, where the method has a mind of its own."""
        return pool

    def draw(
        self, recipe: Recipe, batch: Batch, branch: str, networks: Networks, pool: Pool | None, rng: torch.Generator
    ) -> Batch:
        """What θ is called on, from the draws that all methods have in common."""
        return batch

    def forward(self, recipe: Recipe, theta: Denoiser, batch: Batch) -> Tensor:
        """What θ is differentiated through, [N, C, H, W]."""
        raise NotImplementedError

    def loss(self, recipe: Recipe, networks: Networks, out: Tensor, batch: Batch, branches: Sequence[str]) -> Tensor:
        """[N], differentiated to `out` alone. branches: of the batch, in order, equally many samples of each."""
        raise NotImplementedError

    def edit(self, recipe: Recipe, networks: Networks, conditions: Conditions) -> None:
        """Change θ in place, of a method in closed form."""
        raise NotImplementedError


class ScoreDistillation(Objective):
    """L_sd and L_sfd over one-step samples, through φ and ψ (Chen et al. 2024)."""

    def forward(self, recipe: Recipe, theta: Denoiser, batch: Batch) -> Tensor:
        return generate(theta, batch.z, batch.c_g, batch.t_g)

    def loss(self, recipe: Recipe, networks: Networks, out: Tensor, batch: Batch, branches: Sequence[str]) -> Tensor:
        assert networks.score is not None
        return generator_loss(
            networks.teacher, networks.score, out, batch.e, batch.t, batch.c_s, batch.c_p, alpha=recipe.alpha,
            guidance_teacher=recipe.guidance.teacher, guidance_score=recipe.guidance.score,
            detach_score=recipe.detach_score,
        )  # fmt: skip


class DenoiserObjective(Objective):
    """Σ_pix ‖ε_θ(x_t, c) − target‖² per sample: an ordinary model of many steps stays one.

    In a batch `z` is x_t itself and `t_g` its timestep; `c_g` what θ is asked for, `c_p` the cover (of kept samples the same).
    """

    pooled: ClassVar[Mapping[str, str]] = {"forget": "own", "retain": "own"}
    noisy: ClassVar[bool] = False  # whether a target is the noise in x_t itself, which a trajectory does not know

    def check(self, recipe: Recipe) -> None:
        scored = recipe.uses_mask and recipe.mask.source == "saliency"
        if recipe.images.source == "trajectory":
            if self.noisy:
                raise RecipeError(
                    f"images.source: method {recipe.method} needs the noise in x_t; use images.source=pool"
                )
            if scored and recipe.mask.score == "mse":
                raise RecipeError(
                    "mask.score: mse needs the noise in x_t, which images.source=trajectory does not know; use "
                    "mask.score=forget_loss, or images.source=pool"
                )
        if scored and recipe.mask.timesteps == "init":
            raise RecipeError(f"mask.timesteps: method {recipe.method} has no one step to take; use uniform or train")
        if contrasts_losses(recipe):
            raise RecipeError(
                f"mask.contrast: with mask.score=forget_loss the kept side of method {recipe.method} has no gradient of its own "
                "at the start; use mask.score=mse, or mask.contrast=false"
            )

    def draw(
        self, recipe: Recipe, batch: Batch, branch: str, networks: Networks, pool: Pool | None, rng: torch.Generator
    ) -> Batch:
        if pool is None:
            x_t, t = along(recipe, networks.generator, batch)
            return replace(batch, z=x_t, t_g=t, t=t)
        x_0, c, cover = pool.draw(branch, len(batch.z), rng)
        t = batch.t if pool.times is None else torch.multinomial(pool.times, len(batch.z), True, generator=rng)
        x_t = networks.teacher.schedule.add_noise(x_0.to(batch.e), batch.e, t)
        return replace(batch, z=x_t, t_g=t, t=t, c_g=c, c_s=c, c_p=cover)

    def forward(self, recipe: Recipe, theta: Denoiser, batch: Batch) -> Tensor:
        return theta.eps(batch.z, batch.t_g, batch.c_g)

    def loss(self, recipe: Recipe, networks: Networks, out: Tensor, batch: Batch, branches: Sequence[str]) -> Tensor:
        with torch.no_grad():
            target = self.targets(recipe, networks, batch, branches)
        return (out - target.to(out)).square().flatten(1).sum(1)

    def targets(self, recipe: Recipe, networks: Networks, batch: Batch, branches: Sequence[str]) -> Tensor:
        """[N, C, H, W], branch by branch."""
        size = len(batch.z) // len(branches)
        parts = (batch.part(slice(i * size, (i + 1) * size)) for i in range(len(branches)))
        return torch.cat([self.target(recipe, networks, part, branch) for part, branch in zip(parts, branches)])

    def target(self, recipe: Recipe, networks: Networks, batch: Batch, branch: str) -> Tensor:
        """What θ is to answer in one branch, [n, C, H, W]."""
        raise NotImplementedError


class Edit(Objective):
    """Closed form: there are no iterations, and no loss."""

    def forward(self, recipe: Recipe, theta: Denoiser, batch: Batch) -> Tensor:
        raise RecipeError(f"method: {recipe.method} takes no iterations")
