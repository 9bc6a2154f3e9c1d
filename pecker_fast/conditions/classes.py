"""What to forget, what to draw in its place, what to keep: class labels and how they are drawn."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast.errors import RecipeError
from pecker_fast.recipe import check_classes, class_list

SHOWN = 16  # rows of a grid, or pieces of a list, at most: a model may have a thousand classes


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

    def pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`forget` and `cover`, int64 each."""
        return _table(self.forget, device), _table(self.cover, device)

    def kept(self, device: torch.device) -> Tensor:
        """`retain`, int64."""
        return _table(self.retain, device)


@functools.lru_cache(maxsize=64)
def _table(classes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [classes], copied to the device once: a copy in each draw would wait for it."""
    return torch.tensor(classes, device=device)


def class_conditions(forget: object, cover: object, retain: object, classes: Sequence[int]) -> Conditions:
    """Check the recipe's forget / cover / retain against the model's classes. Raises RecipeError with key, value and remedy.

    forget: class or list; cover: one class for all of them, or a list as long; retain: None = every other class, or a list.
    """
    forgotten, covers = _in_model("forget", forget, classes), _in_model("cover", cover, classes)
    kept = [c for c in classes if c not in forgotten] if retain is None else _in_model("retain", retain, classes)
    try:
        check_classes(forgotten, covers, kept)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if not kept:
        raise RecipeError("retain: no class is left to keep; forget fewer classes")
    covers = covers * len(forgotten) if len(covers) == 1 else covers
    return Conditions(tuple(forgotten), tuple(covers), tuple(kept), tuple(classes))


def _in_model(key: str, value: object, classes: Sequence[int]) -> list[int]:
    """A key's classes as a list; raises RecipeError where one is none, or none of the model's."""
    values = value if isinstance(value, list | tuple) else [value]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int):
            raise RecipeError(
                f"{key}: {v!r} is not a class number; this model is class-conditional (classes {short_range(classes)})"
            )
        if v not in classes:
            raise RecipeError(f"{key}: class {v} is out of range; the model's classes are {short_range(classes)}")
    try:
        return class_list(value, distinct=key != "cover")
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from None


def short_range(classes: Sequence[int]) -> str:
    """Increasing class numbers in few words: "0 to 4, 6 to 999"; of many pieces the first and the last."""
    pieces: list[list[int]] = []
    for c in classes:
        if pieces and c == pieces[-1][-1] + 1:
            pieces[-1][1:] = [c]
        else:
            pieces.append([c])
    if len(pieces) > SHOWN:
        return ", ".join(map(_piece, pieces[: SHOWN - 1])) + f", … {_piece(pieces[-1])}"
    return ", ".join(map(_piece, pieces))


def _piece(ends: list[int]) -> str:
    return " to ".join(map(str, ends))


def shown_classes(forget: Sequence[int], cover: Sequence[int], others: Sequence[int]) -> list[int]:
    """Classes that an image grid or a card shows, in order: all, or of more than `SHOWN` what is forgotten, its covers and
    the next few. Room is left for covers and others where very many are forgotten."""
    everything = sorted({*forget, *cover, *others})
    if len(everything) <= SHOWN:
        return everything
    pairs = list(zip(forget, cover))[: SHOWN // 4]
    chosen = dict.fromkeys(c for pair in pairs for c in pair)
    for c in others:
        if len(chosen) >= SHOWN:
            break
        chosen.setdefault(c)
    return sorted(chosen)
