"""PECKER (arXiv 2604.05634): SFD whose forget updates touch the salient weights only."""

from pecker_kernels import SaliencyMask
from torch import nn

from pecker_fast.forgetting.updates import RULES, Dense, DifferentiatedSum, UpdateRule
from pecker_fast.recipe import Recipe


class Pecker:
    """The update rule of the recipe under the saliency mask; without a mask (`mask.source=none`) it is SFD."""

    @staticmethod
    def updates(recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None) -> UpdateRule:
        rule = Dense if mask is None else RULES[recipe.update_rule]
        return rule(recipe, named, mask)

    @staticmethod
    def updates_of_sums(recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None) -> UpdateRule:
        """As `updates`, for an engine that masks and adds up the branches' gradients before an optimizer sees them."""
        if mask is not None and recipe.update_rule == "differentiated":
            return DifferentiatedSum(recipe, named, mask)
        return Pecker.updates(recipe, named, mask)
