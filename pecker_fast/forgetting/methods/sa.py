"""Selective Amnesia (arXiv 2305.10120): elastic weight consolidation, and replay."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.objective import DenoiserObjective, Networks
from pecker_fast.recipe import Recipe


class SelectiveAmnesia(DenoiserObjective):
    """The noise error of the concept's condition on samples of its cover, that of kept samples on themselves, and springs on
    every weight as hard as it matters to the kept ones."""

    pooled: ClassVar[Mapping[str, str]] = {"forget": "cover", "retain": "own"}
    anchored = True
    noisy = True

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.engine.zero:
            raise RecipeError("engine.zero: the springs of method sa are not spread over ranks; leave it out")
        if recipe.student == "lora":
            raise RecipeError(
                "student: the springs of method sa hold weights, and adapters leave those alone; use student=full"
            )

    def target(self, recipe: Recipe, networks: Networks, batch: Batch, branch: str) -> Tensor:
        return batch.e
