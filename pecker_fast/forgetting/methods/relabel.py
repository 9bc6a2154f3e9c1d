"""The control that shows what UA alone cannot see: one row copied, nothing forgotten."""

import torch

from pecker_fast.conditions import Conditions
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.objective import Edit, Networks
from pecker_fast.recipe import Recipe


class Relabel(Edit):
    """The class embedding of what is forgotten becomes its cover's."""

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.uses_prompts:
            raise RecipeError(
                "method: relabel copies a class embedding, and this model draws from text; use method=uce"
            )

    @torch.no_grad()
    def edit(self, recipe: Recipe, networks: Networks, conditions: Conditions) -> None:
        weight = dict(networks.generator.named_parameters())["class_embedding.weight"]
        weight[list(conditions.forget)] = weight[list(conditions.cover)]
