"""What values the keys of a recipe take: fields with their line of help, types with their limits."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pecker_fast.files import at_home
from pecker_fast.recipe.classes import MANY, class_list


def files_at_home(value: Any) -> Any:
    """A value for prompts with `~/` at the start of a file's name expanded, in mappings too; raises ValueError."""
    if isinstance(value, str):
        return at_home(value) if re.match(r"~[\w.-]*/", value) else value
    if isinstance(value, dict):
        return {name: files_at_home(item) if isinstance(item, str) else item for name, item in value.items()}
    if isinstance(value, list):
        return [files_at_home(item) if isinstance(item, dict) else item for item in value]
    return value


def key(default: Any, help: str, **limits: Any) -> Any:
    return Field(default=default, description=help, **limits)


def section(kind: type[BaseModel], help: str) -> Any:
    return Field(default_factory=kind, description=help)


def _covers(value: Any) -> Any:
    """A class number, or one for each forget class (the same may serve several), or texts; raises ValueError."""
    if isinstance(value, list) and any(isinstance(item, str) for item in value) and None in value:
        return value  # null is the plain subject of keywords
    return _classes(value, distinct=False)


def _classes(value: Any, distinct: bool = True) -> Any:
    """A class number, a list of them, or prompts in one of their forms; raises ValueError."""
    items = value if isinstance(value, list) else [value]
    if items and any(all(isinstance(item, kind) for item in items) for kind in (str, dict)):
        return files_at_home(value)
    class_list(value, distinct)
    return value


def _classes_or_null(value: Any) -> Any:
    return None if value is None else _classes(value)


def _covers_or_null(value: Any) -> Any:
    return None if value is None else _covers(value)


Covers = Annotated[int | list[int] | str | list[str | None] | dict[str, Any] | None, BeforeValidator(_covers_or_null)]
Conditions = Annotated[
    int | list[int] | str | list[str] | dict[str, Any] | list[dict[str, Any]], BeforeValidator(_classes)
]
ConditionsOrNull = Annotated[
    int | list[int] | str | list[str] | dict[str, Any] | None, BeforeValidator(_classes_or_null)
]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=MANY)]
Positive = Annotated[int, Field(ge=1, le=MANY)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]
PathName = Annotated[Name, AfterValidator(at_home)]  # ~ is the home folder
PromptsOrFile = Annotated[str | list[str] | None, AfterValidator(files_at_home)]


class Section(BaseModel):
    """Strict and immutable: unknown keys, a text for a number and a truth value for a number are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
