"""What a recipe has to know of a method: what comes out of it, and which keys have other defaults with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pecker_fast import files
from pecker_fast.errors import RecipeError
from pecker_fast.recipe.yaml import parse_yaml

FOLDER = Path(__file__).parent / "shipped" / "methods"
# keys that say what is to be done, and not how: they stay when a recipe of one method is given another
KEPT = (
    "model", "revision", "model_config", "forget", "cover", "retain", "null_class", "resolution", "precision", "guidance",
    "engine", "evaluate", "audit", "checkpoint", "seed", "output", "resume",
)  # fmt: skip
Kind = Literal["one-step", "denoiser", "edit"]


@dataclass(frozen=True)
class MethodKeys:
    """kind: "one-step" = a generator is trained beside a score network ψ; "denoiser" = the model stays one of many steps;
    "edit" = so it does, changed in closed form, without iterations. masked: whether a mask may be computed. defaults: recipe
    keys, sections as mappings, that are not what they are elsewhere."""

    says: str
    kind: Kind
    masked: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def one_step(self) -> bool:
        """Whether the result is a one-step generator, trained beside a score network; else it is a model of many steps."""
        return self.kind == "one-step"


@functools.cache
def _methods() -> dict[str, MethodKeys]:
    found = {path.stem: parse_yaml(files.read_text(path), f"method {path.stem}") for path in FOLDER.glob("*.yaml")}
    order = sorted(found, key=lambda name: (found[name].pop("place"), name))
    return {name: MethodKeys(**found[name]) for name in order}


def methods() -> Mapping[str, MethodKeys]:
    """What there is, by name."""
    return _methods()


def add_method(name: str, keys: MethodKeys) -> None:
    """Let recipes name one more method. Raises RecipeError where the name is taken."""
    if name in _methods():
        raise RecipeError(f"method: {name} is taken; give yours another name")
    _methods()[name] = keys


def drop_method(name: str) -> None:
    """Undo `add_method`."""
    _methods().pop(name, None)


def with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe data with its method's own defaults where it gives nothing."""
    name = data.get("method")
    found = _methods().get(name) if isinstance(name, str) else None
    return dict(data) if found is None else _beneath(found.defaults, data)


def for_method(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Recipe data of one method for another: what it says of how is left to that one, unless both share their defaults."""
    before, after = (_methods().get(key) for key in (data.get("method", "pecker"), name))
    if before is None or after is None or before.defaults == after.defaults:
        return {**data, "method": name}
    return {**{key: value for key, value in data.items() if key in KEPT}, "method": name}


def _beneath(defaults: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in data.items():
        under = merged.get(key)
        merged[key] = _beneath(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged
