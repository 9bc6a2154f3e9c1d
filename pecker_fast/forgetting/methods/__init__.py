"""The methods by name, a file each. What a recipe has to know of them stands in `recipe/shipped/methods`."""

from pecker_fast.forgetting.methods.esd import ESD
from pecker_fast.forgetting.methods.pecker import Pecker
from pecker_fast.forgetting.methods.relabel import Relabel
from pecker_fast.forgetting.methods.sa import SelectiveAmnesia
from pecker_fast.forgetting.methods.salun import SalUn
from pecker_fast.forgetting.methods.sfd import SFD
from pecker_fast.forgetting.methods.spare import Spare
from pecker_fast.forgetting.methods.uce import UCE
from pecker_fast.forgetting.objective import Objective
from pecker_fast.forgetting.updates import UpdateRule
from pecker_fast.recipe import MethodKeys, Recipe, add_method, drop_method, known

METHODS: dict[str, Objective] = {
    "pecker": Pecker(),
    "sfd": SFD(),
    "spare": Spare(),
    "salun": SalUn(),
    "esd": ESD(),
    "sa": SelectiveAmnesia(),
    "uce": UCE(),
    "relabel": Relabel(),
}

__all__ = ["METHODS", "Objective", "UpdateRule", "check_method", "get_method", "register", "unregister"]


def get_method(name: str) -> Objective:
    """The method called `name`. Raises RecipeError naming the methods there are."""
    return METHODS[known("method", name, METHODS)]


def register(name: str, objective: Objective, keys: MethodKeys) -> None:
    """Let recipes name a method of one's own. Raises RecipeError where the name is taken."""
    add_method(name, keys)
    METHODS[name] = objective


def unregister(name: str) -> None:
    """Undo `register`."""
    drop_method(name)
    METHODS.pop(name, None)


def check_method(recipe: Recipe) -> None:
    """Raise RecipeError, before anything is loaded, for keys that do not go with the recipe's method."""
    get_method(recipe.method).check(recipe)
