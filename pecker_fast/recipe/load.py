"""Recipes read and written: a shipped name, a YAML file, a mapping; overrides of the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pecker_fast import files
from pecker_fast.errors import RecipeError
from pecker_fast.recipe.errors import closest, explain, fields_of, section_type, show
from pecker_fast.recipe.methods import for_method, methods, with_defaults
from pecker_fast.recipe.overrides import override_values
from pecker_fast.recipe.schema import Recipe
from pecker_fast.recipe.yaml import dump_yaml, parse_yaml

RECIPES = Path(__file__).parent / "shipped"
MAX_RECIPE_BYTES = 1 << 20


def shipped_recipes() -> dict[str, Path]:
    """Recipes inside the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(source: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file (None: the defaults), with `key.sub=value` overrides applied.

    Raises RecipeError, one line that names the dotted key and the remedy.
    """
    data: Any = {}
    where = "recipe"
    if source is not None:
        path = shipped_recipes().get(str(source)) if isinstance(source, str) else None
        path = path or _path(source)
        where = f"recipe {path}" if path.parent != RECIPES else f"recipe {path.name}"
        data = _read(path, source, where)
    values = override_values(overrides, data)
    named = next((value for key, value in reversed(values) if key == "method"), None)
    if isinstance(named, str) and named in methods():
        data = _of_method(data, named, str(source))
    given: dict[str, Any] = {}
    for key, value in values:
        given[key] = value
        _apply(data, key, value)
    name = data.get("method")
    if isinstance(name, str) and name in methods() and not methods()[name].masked:
        for key, value in given.items():
            if key.split(".")[0] == "mask" and (key, value) != ("mask.source", "none"):
                raise RecipeError(f"override {key}: method {name} has no mask; use method=pecker, or leave {key} out")
    return recipe_from(data, where, overridden=given)


def _of_method(data: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """A recipe's data for another method: the shipped recipe that was made for both, else what it says of the task alone."""
    if data.get("method", "pecker") == name:
        return data
    found = for_method(data, name)
    own = shipped_recipes().get(f"{source}_{name}")
    if own is None or found == {**data, "method": name}:
        return found
    return _read(own, own, f"recipe {own.name}")


def _path(source: str | Path) -> Path:
    try:
        return Path(files.at_home(str(source)))
    except ValueError as reason:
        raise RecipeError(f"recipe {str(source)[:200]}: {reason}") from None


def _read(path: Path, source: str | Path, where: str) -> dict[str, Any]:
    if not os.path.exists(path):  # unlike Path.exists, false for a name too long to be one
        names = list(shipped_recipes())
        close = closest(path.stem, names)
        hint = f", did you mean {close}?" if close else ""
        raise RecipeError(
            f"recipe {str(source)[:200]}: no such recipe or file{hint} (shipped recipes: {', '.join(names)})"
        )
    text = files.read_text(path, limit=MAX_RECIPE_BYTES, error=RecipeError)
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        found = "it is empty" if data is None else f"it holds a {type(data).__name__}"
        raise RecipeError(
            f"{where}: expected `key: value` lines, but {found}; `pecker-fast recipes show digits` is one"
        )
    return data


def _apply(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a mapping is merged into a section."""
    *parents, last = key.split(".")
    for name in parents:
        inside = data.get(name)
        if name == "lr" and isinstance(inside, int | float):
            inside = {"generator": inside, "score": inside}
        if inside is not None and not isinstance(inside, dict):
            raise RecipeError(f"override {key}: {name} is {show(inside)} in the recipe, not a section")
        data[name] = data = inside or {}
    old = data.get(last)
    section = section_type(fields_of(Recipe).get(key))
    data[last] = {**old, **value} if section and isinstance(old, dict) and isinstance(value, dict) else value


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with other values of some keys, `key.sub=value` each. Raises RecipeError."""
    data, given = recipe_to_dict(recipe), {}
    for override in overrides:
        key, _, text = override.partition("=")
        given[key] = parse_yaml(text, f"override {key}")
        _apply(data, key, given[key])
    return recipe_from(data, overridden=given)


def recipe_from(data: Mapping[str, Any], where: str = "recipe", overridden: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a mapping as it stands in YAML; raises RecipeError starting with `where`."""
    try:
        return Recipe.model_validate(with_defaults(data))
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, where, overridden or {})) from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values, keys as in YAML and in their documented order."""
    return recipe.model_dump(by_alias=True)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump_yaml(recipe_to_dict(recipe))
