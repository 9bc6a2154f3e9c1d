"""Lines of text from a recipe or a prompt file, cleaned and checked; each knows where it stands, for error messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pecker_fast.conditions.prompt_file import SUFFIXES, clean, numbered_prompts, odd_character
from pecker_fast.conditions.words import folded
from pecker_fast.errors import DataError, RecipeError
from pecker_fast.files import check_entry, tree_of
from pecker_fast.recipe import show

MAX_PROMPT_LENGTH = 1000  # characters; far above the 77 tokens a text encoder reads
MAX_PROMPTS = 100_000  # of a kind; each takes an embedding


class Line(NamedTuple):
    """A text and where it stands: dotted key, then file and line where it comes from a file."""

    where: str
    text: str


def prompts_or_file(key: str, value: Any, folders: Sequence[Path], expected: str) -> list[Line]:
    """Lines of a list or a prompt file, or the one prompt that is given."""
    if isinstance(value, list | tuple) or (isinstance(value, str) and names_file(value, folders)):
        return read_lines(key, value, folders, "prompts")
    return [one_line(key, value, expected)]


def read_lines(key: str, value: Any, folders: Sequence[Path], what: str) -> list[Line]:
    """The texts of a file or of a list, at least one."""
    if isinstance(value, str):
        lines = _file_lines(key, value, folders, what)
    elif isinstance(value, list | tuple):
        if names := [item for item in value if isinstance(item, str) and item.lower().endswith(SUFFIXES)]:
            raise RecipeError(f"{key}: the file {show(names[0])} stands in a list; give one file, or the {what}")
        lines = [one_line(f"{key}.{at}", item, "text") for at, item in enumerate(value)]
        if not lines:
            raise RecipeError(f"{key}: the list is empty; give {what}")
    else:
        raise RecipeError(f"{key}: expected a file with one of the {what} a line, or a list, got {show(value)}")
    if len(lines) > MAX_PROMPTS:
        raise RecipeError(f"{key}: {len(lines)} {what} are too many (at most {MAX_PROMPTS})")
    return lines


def _file_lines(key: str, name: str, folders: Sequence[Path], what: str) -> list[Line]:
    path = next(filter(os.path.isfile, _candidates(name, folders)), None)
    if path is None:
        looked = "".join(f", {folder}" for folder in folders)
        raise RecipeError(f"{key}: no file {name[:200]!r} with {what} (looked in the current folder{looked})")
    if not os.path.isfile(name):  # found in a folder of somebody else's, perhaps: its prompts go into the run's files
        folder = next(folder for folder in folders if path == Path(folder) / name)
        check_entry(path, tree_of(folder))
    try:
        found, numbers = numbered_prompts(path)
    except DataError as reason:
        raise RecipeError(f"{key}: {reason}") from None
    if not found.texts:
        raise RecipeError(f"{key}: {path} holds no {what}; write one a line")
    places = (f"{key}: {path} line {at}" for at in numbers)
    return [Line(where, checked(where, text)) for where, text in zip(places, found.texts)]


def _candidates(name: str, folders: Sequence[Path]) -> list[Path]:
    return [Path(name), *(Path(folder) / name for folder in folders)]


def names_file(text: str, folders: Sequence[Path]) -> bool:
    """Whether a text names a prompt file and is none of the prompts itself."""
    return text.lower().endswith(SUFFIXES) or any(map(os.path.isfile, _candidates(text, folders)))


def one_line(key: str, value: Any, expected: str) -> Line:
    """One text of the recipe, not blank."""
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{key}: expected {expected}, got {show(value)}")
    return Line(key, checked(key, value))


def checked(where: str, text: str) -> str:
    """The text in its clean form; raises RecipeError for characters that are no text and for too many of them."""
    text = clean(text)
    if bad := odd_character(text):
        raise RecipeError(f"{where}: holds the character {bad!r}, which is no text")
    check_length(where, text, "the text")
    return text


def check_length(where: str, text: str, what: str) -> None:
    if len(text) > MAX_PROMPT_LENGTH:
        raise RecipeError(
            f"{where}: {what} {show(text)} has {len(text)} characters (at most {MAX_PROMPT_LENGTH}); shorten it"
        )


def distinct(lines: Iterable[Line]) -> list[Line]:
    """The first of all lines that differ in nothing but case, in their order."""
    first: dict[str, Line] = {}
    for line in lines:
        first.setdefault(folded(line.text), line)
    return list(first.values())
