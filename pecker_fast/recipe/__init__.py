"""What a run is asked to do: the keys, their YAML, errors in one line, the shipped recipes and prompt texts."""

from pecker_fast.recipe.errors import closest, show
from pecker_fast.recipe.schema import (
    RECIPES,
    LearningRates,
    Recipe,
    idle_keys,
    load_recipe,
    recipe_from,
    recipe_help,
    recipe_to_dict,
    recipe_to_yaml,
    shipped_recipes,
)

__all__ = [
    "RECIPES",
    "LearningRates",
    "Recipe",
    "closest",
    "idle_keys",
    "load_recipe",
    "recipe_from",
    "recipe_help",
    "recipe_to_dict",
    "recipe_to_yaml",
    "shipped_recipes",
    "show",
]
