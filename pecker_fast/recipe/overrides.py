"""Values of `key=value` on the command line, which is no YAML: texts are taken as they are written.

| the key takes | the value is read as |
|---|---|
| text (`output`, `model`, `forget.concept`, …) | it is written; `null` alone is nothing where the key may be null |
| `forget`, `cover`, `retain` | class numbers where the recipe has classes, else text; `[…]` and `{…}` are YAML |
| anything else (numbers, choices, sections) | YAML, in which # begins no comment |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pecker_fast.errors import RecipeError
from pecker_fast.recipe.errors import fields_of, show
from pecker_fast.recipe.schema import Recipe, is_text
from pecker_fast.recipe.yaml import parse_yaml

_CONDITIONS = ("forget", "cover", "retain")
_LISTS = (*_CONDITIONS, "prompts", "captions", "keywords")
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def override_values(overrides: Sequence[str], data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(dotted key, value) of each `key=value` for the recipe `data`, in their order; raises RecipeError."""
    given: list[tuple[str, str]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            raise RecipeError(f"override {override[:80]!r}: expected key=value, such as mask.density=0.1")
        if bad := _NO_TEXT.search(text):
            raise RecipeError(f"override {key[:80]!r}: holds the character {bad[0]!r}, which is no text")
        given.append((key, text))
    prompts = is_text(data.get("forget"))
    for key, text in given:  # whether cover and retain are texts depends on forget, wherever that stands
        value = _condition(key, text, prompts) if key == "forget" else None
        prompts = (
            prompts or key.startswith("forget.") or all(map(is_text, value if isinstance(value, list) else [value]))
        )
    return [(key, _value(key, text, prompts)) for key, text in given]


def _value(key: str, text: str, prompts: bool) -> Any:
    if key.partition(".")[0] in _CONDITIONS:
        return _condition(key, text, prompts)
    where, field = f"override {key}", fields_of(Recipe).get(key)
    if field is None:
        return _yaml_or_text(text, where)
    kinds = _kinds(field.annotation)
    if str not in kinds:
        if re.search(r"(?:^|\s)#", text):
            raise RecipeError(f"{where}: expected a value without a comment, got {show(text)}")
        return parse_yaml(text, where)
    if type(None) in kinds and text in ("", "null"):
        return None
    return parse_yaml(text, where, texts=True) if list in kinds and _is_flow(text) else text


def _kinds(kind: Any) -> set[Any]:
    """The plain types of an annotation; of a choice of words, text."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {str}
    if hasattr(kind, "__metadata__"):
        return _kinds(inner[0])
    if origin in (list, dict) or not inner:
        return {origin or kind}
    return set().union(*map(_kinds, inner))


def _condition(key: str, text: str, prompts: bool) -> Any:
    """The value of forget, cover or retain, or of a key inside; prompts: they are texts in this recipe."""
    where = f"override {key}"
    if _is_flow(text) and key.rpartition(".")[2] in _LISTS:
        return parse_yaml(text, where, texts=prompts or text[0] == "{")
    if prompts or "." in key:
        return None if text in ("", "null") and key in ("cover", "retain") else text
    value = _yaml_or_text(text, where)
    comment = value is None and text not in ("", "null", "~")
    return text if comment or isinstance(value, str) else value


def _is_flow(text: str) -> bool:
    return text[:1] + text[-1:] in ("[]", "{}")


def _yaml_or_text(text: str, where: str) -> Any:
    try:
        return parse_yaml(text, where)
    except RecipeError:
        return text
