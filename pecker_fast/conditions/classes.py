"""What to forget, what to draw in its place, what to keep: class labels and how they are drawn."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pecker_fast.errors import RecipeError


@dataclass(frozen=True)
class Conditions:
    """forget[i] is drawn as cover[i]; retain classes keep their own look. `all_classes` is what plain distillation learns."""

    forget: tuple[int, ...]
    cover: tuple[int, ...]
    retain: tuple[int, ...]
    all_classes: tuple[int, ...]

    def draw(self, branch: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(c_g, c_p), int64 [n] each: generator condition and teacher condition of `branch` ("retain", "forget" or "all")."""
        classes = {"retain": self.retain, "forget": self.forget, "all": self.all_classes}[branch]
        index = torch.randint(len(classes), (n,), generator=generator, device=generator.device)
        c_g = _table(classes, generator.device)[index]
        return c_g, (_table(self.cover, generator.device)[index] if branch == "forget" else c_g)


@functools.lru_cache(maxsize=64)
def _table(classes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [classes], copied to the device once: a copy in each draw would wait for it."""
    return torch.tensor(classes, device=device)


def class_conditions(forget: object, cover: object, retain: object, classes: Sequence[int]) -> Conditions:
    """Check the recipe's forget / cover / retain against the model's classes. Raises RecipeError with key, value and remedy.

    forget: class or list; cover: one class for all of them, or a list as long; retain: None = every other class, or a list.
    """
    forget_list = _class_list("forget", forget, classes)
    cover_list = _class_list("cover", cover, classes)
    if len(cover_list) == 1:
        cover_list *= len(forget_list)
    if len(cover_list) != len(forget_list):
        raise RecipeError(
            f"cover: {len(cover_list)} classes for {len(forget_list)} forget classes; give one, or one for each"
        )
    for c in cover_list:
        if c in forget_list:
            raise RecipeError(f"cover: class {c} is to be forgotten itself; choose a cover class outside forget")
    if retain is None:
        retain_list = [c for c in classes if c not in forget_list]
    else:
        retain_list = _class_list("retain", retain, classes)
        for c in retain_list:
            if c in forget_list:
                raise RecipeError(f"retain: class {c} is to be forgotten; take it out of retain or out of forget")
    if not retain_list:
        raise RecipeError("retain: no class is left to keep; forget fewer classes")
    return Conditions(tuple(forget_list), tuple(cover_list), tuple(retain_list), tuple(classes))


def _class_list(key: str, value: object, classes: Sequence[int]) -> list[int]:
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise RecipeError(f"{key}: the list is empty; name at least one class")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int):
            raise RecipeError(
                f"{key}: {v!r} is not a class number; this model is class-conditional (classes {_range(classes)})"
            )
        if v not in classes:
            raise RecipeError(f"{key}: class {v} is out of range; the model's classes are {_range(classes)}")
    if len(set(values)) != len(values) and key != "cover":
        raise RecipeError(f"{key}: a class is named twice in {values}")
    return values


def _range(classes: Sequence[int]) -> str:
    contiguous = list(classes) == list(range(classes[0], classes[-1] + 1))
    return f"{classes[0]} to {classes[-1]}" if contiguous else ", ".join(map(str, classes))
