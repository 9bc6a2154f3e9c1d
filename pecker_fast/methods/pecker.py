"""PECKER (arXiv 2604.05634): SFD whose forget updates touch the salient weights only."""

from pecker_kernels import SaliencyMask
from torch import nn

from pecker_fast.config import Recipe
from pecker_fast.methods.updates import RULES, Dense, UpdateRule


class Pecker:
    """The update rule of the recipe under the saliency mask; without a mask (`mask.source=none`) it is SFD."""

    @staticmethod
    def updates(recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None) -> UpdateRule:
        rule = Dense if mask is None else RULES[recipe.update_rule]
        return rule(recipe, named, mask)
