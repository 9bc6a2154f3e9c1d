"""Score Forgetting Distillation (Chen et al. 2024): both branches in one dense step, no mask."""

from pecker_kernels import SaliencyMask
from torch import nn

from pecker_fast.forgetting.objective import ScoreDistillation
from pecker_fast.forgetting.updates import Dense, UpdateRule
from pecker_fast.recipe import Recipe


class SFD(ScoreDistillation):
    """L_θ = g_r L_sd + g_f L_sfd, one Adam over all weights."""

    def updates(self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None) -> UpdateRule:
        return Dense(recipe, named, None)

    updates_of_sums = updates
