"""`--without`: what a model never gets to know. Teacher and one-step generator see none of it; VAE and judges do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pecker_fast.data import ATTRIBUTES, Dataset
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import closest, show

Without = str | Sequence[int | str]  # names with commas between them, or a list
NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
}  # of data sets whose files tell none


def missing_classes(given: Without, data: Dataset) -> tuple[int, ...]:
    """The classes, in order, that `given` names by number or by name; where a name is itself a number, names go first.

    Raises RecipeError for what is no class of the data, for one that stands twice, and for all of them.
    """
    names: tuple[str, ...] = data.class_names or NAMES.get(data.name) or ()
    values = _values(given)
    found = [_class_of(value, data.num_classes, names) for value in values]
    _check(values, found, data.num_classes, "classes")
    return tuple(sorted(found))


def _class_of(value: int | str, count: int, names: Sequence[str]) -> int:
    text = str(value).strip()
    if isinstance(value, str):
        alike = [name for name in names if name.casefold() == text.casefold()]
        if text in names or len(alike) == 1:
            return names.index(text if text in names else alike[0])
    if text.isascii() and text.isdecimal() and int(text[:20]) < count:
        return int(text)
    close = closest(text, names)
    hint = (
        f", did you mean {close}?" if close else f"; classes are 0 to {count - 1}{', or their names' if names else ''}"
    )
    raise RecipeError(f"without: {show(text)} is no class of {count}{hint}")


def missing_words(given: Without) -> tuple[str, ...]:
    """The words of shapes, in the order of `ATTRIBUTES`. Raises RecipeError as `missing_classes` does, and for all words of an
    attribute."""
    every = [word for words in ATTRIBUTES.values() for word in words]
    found, values = [], _values(given)
    for value in values:
        text = str(value).strip().casefold()
        if text not in every:
            close = closest(text, every)
            hint = f", did you mean {close}?" if close else f"; the words are {', '.join(every)}"
            raise RecipeError(f"without: {show(str(value).strip())} is no word of shapes{hint}")
        found.append(text)
    for name, words in ATTRIBUTES.items():
        _check(values, [word for word in found if word in words], len(words), f"words of {name}")
    return tuple(sorted(found, key=every.index))


def _values(given: Without) -> Sequence[int | str]:
    return given.split(",") if isinstance(given, str) and given else given


def _check(given: Sequence[int | str], found: Sequence[int | str], count: int, what: str) -> None:
    twice = next((value for at, value in enumerate(found) if value in found[:at]), None)
    if twice is not None:
        raise RecipeError(f"without: {twice} stands twice in {','.join(map(str, given))[:60]}; name it once")
    if len(found) == count:
        raise RecipeError(f"without: these are all {count} {what}; leave some to learn from")


def shows_none(words: Tensor, without: Sequence[str]) -> Tensor:
    """Which pictures show none of these words: bool `[n]`, of word indices `[n, 4]`."""
    shown = torch.zeros(len(words), dtype=torch.bool)
    for column, names in zip(words.unbind(1), ATTRIBUTES.values()):
        gone = [names.index(word) for word in without if word in names]
        shown |= torch.isin(column, torch.tensor(gone, dtype=torch.long))
    return ~shown


def option(without: Sequence[int | str]) -> str:
    """As it stands in the command."""
    return f" --without {','.join(map(str, without))}" if without else ""
