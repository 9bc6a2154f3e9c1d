"""Prompt files of a recipe, replaced by the texts they hold, so that a run needs none of them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pecker_fast.conditions.lines import SUFFIXES, names_file, read_lines

_LISTS = ("prompts", "captions", "keywords")  # of a mapping


def inlined(forget: Any, cover: Any, retain: Any, folders: Sequence[Path] = ()) -> tuple[Any, Any, Any]:
    """`forget`, `cover` and `retain` as `plan_prompts` takes them, equal in what they mean and without a file.

    Raises RecipeError for a file that cannot be read.
    """
    forget_lists = isinstance(forget, Mapping) or (
        isinstance(forget, list | tuple) and any(isinstance(item, Mapping) for item in forget)
    )
    if not forget_lists:
        return _maybe("forget", forget, folders), _maybe("cover", cover, folders), _texts("retain", retain, folders)
    if isinstance(forget, Mapping):
        found: Any = _mapping("forget", forget, folders)
    else:
        found = [_mapping(f"forget.{at}", item, folders) for at, item in enumerate(forget)]
    return found, cover, _texts("retain", retain, folders)


def inlined_captions(key: str, value: Any, folders: Sequence[Path] = ()) -> Any:
    """The texts of a caption file, or the list that is given in its place."""
    return _texts(key, value, folders)


def _mapping(key: str, value: Any, folders: Sequence[Path]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: _texts(f"{key}.{name}", item, folders) if name in _LISTS else item for name, item in value.items()}


def _maybe(key: str, value: Any, folders: Sequence[Path]) -> Any:
    """A prompt stays one; a file becomes its texts."""
    return _texts(key, value, folders) if isinstance(value, str) and names_file(value, folders) else value


def _texts(key: str, value: Any, folders: Sequence[Path]) -> Any:
    if not isinstance(value, str):
        return value
    # in a list, a text with such an ending is taken for a file: a blank, which is cut off again, tells them apart
    texts = [line.text for line in read_lines(key, value, folders, "texts")]
    return [f"{text} " if text.lower().endswith(SUFFIXES) else text for text in texts]
