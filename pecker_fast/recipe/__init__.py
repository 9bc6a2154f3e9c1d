"""What a run is asked to do: the keys, their YAML, errors in one line, the shipped recipes and prompt texts."""

from pecker_fast.recipe.classes import check_classes, class_list
from pecker_fast.recipe.errors import closest, known, show
from pecker_fast.recipe.keys import idle_keys, recipe_help
from pecker_fast.recipe.load import (
    MAX_RECIPE_BYTES,
    RECIPES,
    load_recipe,
    recipe_from,
    recipe_to_dict,
    recipe_to_yaml,
    shipped_recipes,
    with_overrides,
)
from pecker_fast.recipe.methods import MethodKeys, add_method, drop_method, for_method, methods
from pecker_fast.recipe.schema import Recipe, is_text
from pecker_fast.recipe.sections import MEANT_FOR, LearningRates, Timesteps
from pecker_fast.recipe.yaml import parse_yaml

__all__ = [
    "MAX_RECIPE_BYTES",
    "MEANT_FOR",
    "RECIPES",
    "LearningRates",
    "MethodKeys",
    "Recipe",
    "Timesteps",
    "add_method",
    "check_classes",
    "class_list",
    "closest",
    "drop_method",
    "for_method",
    "idle_keys",
    "is_text",
    "known",
    "load_recipe",
    "methods",
    "parse_yaml",
    "recipe_from",
    "recipe_help",
    "recipe_to_dict",
    "recipe_to_yaml",
    "shipped_recipes",
    "show",
    "with_overrides",
]
