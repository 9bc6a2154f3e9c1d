"""Which class numbers `forget`, `cover` and `retain` may name together, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pecker_fast.recipe.errors import show

MANY = 10**9  # a limit for counts, far above any use, far below what overflows


def class_list(value: Any, distinct: bool = True) -> list[int]:
    """A class number, or a list of them, as a list; raises ValueError."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError("the list is empty; name at least one class, or one prompt")
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise ValueError(f"expected a class number or a list of them, got {show(item)}")
        if not 0 <= item <= MANY:
            raise ValueError(f"a class number is 0 or more, got {item}")
    if distinct and len(set(items)) < len(items):
        raise ValueError(f"a class is named twice in {show(items)}")
    return items


def check_classes(forget: Sequence[int], cover: Sequence[int], retain: Sequence[int]) -> None:
    """Raise ValueError, naming the key, where a forgotten class covers or is kept, or there are not as many covers."""
    if shared := [c for c in cover if c in forget]:
        raise ValueError(f"cover: class {shared[0]} is to be forgotten itself; choose a class outside forget")
    if shared := [c for c in retain if c in forget]:
        raise ValueError(f"retain: class {shared[0]} is to be forgotten; take it out of retain or out of forget")
    if len(cover) not in (1, len(forget)):
        raise ValueError(f"cover: {len(cover)} classes for {len(forget)} forget classes; give one, or one for each")
