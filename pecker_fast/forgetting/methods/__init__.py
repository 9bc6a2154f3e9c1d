"""The unlearning methods by name. A method says how gradients become an update of θ."""

from pecker_fast.forgetting.methods.pecker import Pecker
from pecker_fast.forgetting.methods.sfd import SFD
from pecker_fast.forgetting.updates import UpdateRule
from pecker_fast.recipe import known

METHODS: dict[str, type[Pecker] | type[SFD]] = {"pecker": Pecker, "sfd": SFD}

__all__ = ["METHODS", "SFD", "Pecker", "UpdateRule", "get_method"]


def get_method(name: str) -> type[Pecker] | type[SFD]:
    """The method class called `name`. Raises RecipeError naming the methods there are."""
    return METHODS[known("method", name, METHODS)]
