"""SalUn (arXiv 2310.12508): relabelling, on salient weights."""

import torch
from torch import Tensor

from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.objective import DenoiserObjective, Networks
from pecker_fast.recipe import Recipe


class SalUn(DenoiserObjective):
    """Asked for the concept, θ answers as θ itself does now when asked for the cover; kept samples keep their noise error."""

    noisy = True

    def target(self, recipe: Recipe, networks: Networks, batch: Batch, branch: str) -> Tensor:
        if branch == "retain":
            return batch.e
        with torch.no_grad():
            return networks.generator.eps(batch.z, batch.t_g, batch.c_p)
