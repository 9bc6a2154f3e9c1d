"""One clear line for every mistake in a recipe: the dotted key, what was wrong, what is right."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pecker_fast.errors import RecipeError

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section of `key: value` lines",
    "model_attributes_type": "a section of `key: value` lines",
    "dict_type": "a section of `key: value` lines",
}


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All fields by dotted key, sections before their keys, in the order of the model."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        fields[key] = field
        if section := section_type(field):
            fields |= fields_of(section, f"{key}.")
    return fields


def section_type(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model of a field that is a section, else None."""
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most probably meant by `word`: fewest letters to change, add, drop or swap; None if all are far."""
    near = difflib.get_close_matches(word[:200], list(choices), n=12, cutoff=0.45)
    ranked = [(_edits(word[:200], choice), -len(choice), choice) for choice in near]
    edits, _, choice = min(ranked, default=(0, 0, None))
    return choice if choice is not None and edits <= max(1, len(choice) // 3) else None


def known(key: str, name: str, choices: Iterable[str]) -> str:
    """`name`, where it is one of the choices. Raises RecipeError: key, value, what was probably meant, all there are."""
    names = list(choices)
    if name not in names:
        close = closest(name, names)
        hint = f", did you mean {close}?" if close else ""
        raise RecipeError(f"{key}: {show(name)} is unknown{hint} (one of {', '.join(names)})")
    return name


def _edits(a: str, b: str) -> int:
    """Optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i] + [0] * len(b)
        for j, y in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], older[j - 2] + 1)
    return row[len(b)]


def suggest_key(key: str, keys: Iterable[str]) -> str | None:
    """The dotted key most probably meant by a dotted key that does not exist."""
    keys = list(keys)
    parent, _, leaf = key.rpartition(".")
    siblings = [other for other in keys if other.rpartition(".")[0] == parent]
    if (close := closest(leaf, [other.rpartition(".")[2] for other in siblings])) is not None:
        return f"{parent}.{close}" if parent else close
    leaves = {other.rpartition(".")[2]: other for other in reversed(keys)}
    return closest(key, keys) or leaves.get(leaf) or leaves.get(closest(leaf, leaves) or "")


def explain(error: ValidationError, model: type[BaseModel], where: str, overridden: Mapping[str, Any]) -> str:
    """The first problem of a failed validation as one line; unknown keys come first, the number of others last."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    fields = fields_of(model)
    key, text = _problem(problems[0], fields)
    keys = dict.fromkeys(_problem(problem, fields)[0] for problem in problems)
    for name in overridden:
        if key == name or key.startswith(f"{name}.") or name.startswith(f"{key}."):
            where = "override"
            if problems[0]["type"] == "extra_forbidden" and name.startswith(key):
                key, text = _unknown(name, fields)
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{where}{' ' if where == 'override' else ': '}{key}: {text}{more}"


def _problem(problem: Any, fields: Mapping[str, FieldInfo]) -> tuple[str, str]:
    """Dotted key and text of one problem."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    key = _show_key([str(part) for part in problem["loc"]])
    if kind == "extra_forbidden":
        close = suggest_key(key, fields)
        return (
            key,
            f"unknown key, did you mean {close}?" if close else "unknown key; `pecker-fast recipes keys` lists them",
        )
    if kind == "value_error":
        text = str(context["error"])
        return (key, text) if key else tuple(text.split(": ", 1))  # type: ignore[return-value]
    field = _field_at(key, fields)
    got = f"got {show(value)}"
    if kind == "literal_error" and field is not None:
        one = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
        choices = [str(choice) for choice in get_args(one)]
        close = closest(str(value), choices)
        return key, f"expected one of {', '.join(choices)}, {got}" + (f"; did you mean {close}?" if close else "")
    if kind in _EXPECTED:
        limits = _limits(field) if kind in ("int_type", "float_type", "finite_number") else ""
        return key, f"expected {_EXPECTED[kind]}{limits}, {got}"
    if kind in ("too_short", "too_long"):
        return key, f"expected {context.get('min_length', context.get('max_length'))} values, {got}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return key, f"expected a number{_limits(field) or ' ' + problem['msg'][16:]}, {got}"
    return key, f"{problem['msg'][0].lower()}{problem['msg'][1:]}, {got}"


def _unknown(key: str, fields: Iterable[str]) -> tuple[str, str]:
    close = suggest_key(key, fields)
    return key, f"unknown key, did you mean {close}?" if close else "unknown key; `pecker-fast recipes keys` lists them"


def _show_key(parts: list[str]) -> str:
    key = ".".join(parts)
    return key if len(key) <= 120 else f"{key[:117]}..."


def _field_at(key: str, fields: Mapping[str, FieldInfo]) -> FieldInfo | None:
    while key and key not in fields:
        key = key.rpartition(".")[0]
    return fields.get(key)


def _limits(field: FieldInfo | None) -> str:
    """Limits of a number as ` in (0, 1]` or ` of at least 0`."""
    if field is None or section_type(field):
        return ""
    low = high = None
    left, right = "[", "]"
    for limit in field.metadata:
        if (bound := getattr(limit, "gt", getattr(limit, "ge", None))) is not None:
            low, left = bound, "(" if hasattr(limit, "gt") else "["
        if (bound := getattr(limit, "lt", getattr(limit, "le", None))) is not None:
            high, right = bound, ")" if hasattr(limit, "lt") else "]"
    if low is None:
        return ""
    if high is None or high >= 1e5:
        return f" {'above' if left == '(' else 'of at least'} {low}"
    return f" in {left}{low}, {high}{right}"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 40
_repr.maxlevel, _repr.maxdict, _repr.maxlist = 2, 3, 4


def show(value: Any) -> str:
    """A value as it would stand in a recipe, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return str(value)
    return _repr.repr(value)
