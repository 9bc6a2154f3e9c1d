"""SPARE (arXiv 2602.07058): masked self-distillation, at the timesteps that decide."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.objective import DenoiserObjective, Networks
from pecker_fast.forgetting.pool import Pool
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe

GRID, EACH = 20, 32  # timesteps that are looked at, and samples of each


class Spare(DenoiserObjective):
    """Asked for the concept, θ answers as φ does when asked for its cover; asked for what is kept, as φ does.

    It is asked on images of both: on its way to a cover θ meets noise that hides one.
    """

    pooled: ClassVar[Mapping[str, str]] = {"forget": "both", "retain": "own"}

    def targets(self, recipe: Recipe, networks: Networks, batch: Batch, branches: Sequence[str]) -> Tensor:
        return networks.teacher.eps(batch.z, batch.t_g, batch.c_p)

    @torch.no_grad()
    def with_times(
        self, recipe: Recipe, teacher: Denoiser, pool: Pool, poll: Callable[[], object] = lambda: None
    ) -> Pool:
        """`objective.crucial`: p(t) ∝ E ‖ε_φ(x_t, c_f) − ε_φ(x_t, c_o)‖², looked at on a grid, between its points linear."""
        if not recipe.objective.crucial:
            return pool
        low, high = recipe.timesteps.min, recipe.timesteps.max
        grid = torch.linspace(low, high - 1, min(GRID, high - low)).round().long()
        rng = draws.generator(recipe.seed, "crucial", 0, teacher.device)
        found = []
        for t in grid.tolist():
            poll()
            x_0, c, cover = pool.draw("forget", min(EACH, len(pool.c["forget"])), rng)
            e = torch.randn(x_0.shape, generator=rng, device=rng.device)
            at = torch.full_like(c, t)
            x_t = teacher.schedule.add_noise(x_0, e, at)
            found.append((teacher.eps(x_t, at, c) - teacher.eps(x_t, at, cover)).square().mean())
        return replace(pool, times=spread(grid, torch.stack(found).float().cpu(), low, high).to(teacher.device))


def spread(grid: Tensor, found: Tensor, low: int, high: int) -> Tensor:
    """Weights of all timesteps, [high], from those of the grid's; nothing below `low`."""
    t = torch.arange(high, dtype=torch.float32)
    right = torch.searchsorted(grid.float(), t).clamp(1, len(grid) - 1) if len(grid) > 1 else torch.zeros_like(grid)
    if len(grid) == 1:
        return torch.where(t >= low, found[0].clamp_min(1e-12), 0.0)
    x0, x1 = grid[right - 1].float(), grid[right].float()
    share = ((t - x0) / (x1 - x0).clamp_min(1)).clamp(0, 1)
    between = found[right - 1] + share * (found[right] - found[right - 1])
    return torch.where(t >= low, between.clamp_min(1e-12), 0.0)
