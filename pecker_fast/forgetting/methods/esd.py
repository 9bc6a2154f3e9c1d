"""ESD (arXiv 2303.07345): what the concept adds to the empty condition, learnt with the opposite sign."""

import torch
from torch import Tensor

from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.objective import DenoiserObjective, Networks
from pecker_fast.recipe import Recipe


class ESD(DenoiserObjective):
    """ε_φ(x_t, ∅) − η (ε_φ(x_t, c_f) − ε_φ(x_t, ∅)); a model without an empty condition is steered from the cover instead."""

    def target(self, recipe: Recipe, networks: Networks, batch: Batch, branch: str) -> Tensor:
        teacher = networks.teacher
        if branch == "retain":
            return teacher.eps(batch.z, batch.t_g, batch.c_g)
        null = teacher.null_class
        away = batch.c_p if null is None else torch.full_like(batch.c_g, null)
        base = teacher.eps(batch.z, batch.t_g, away)
        return base - recipe.objective.eta * (teacher.eps(batch.z, batch.t_g, batch.c_g) - base)
