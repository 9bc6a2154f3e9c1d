"""What a value of a foreign JSON file may be: its type, range and length, in one line where it is not.

True and false are no numbers here, and NaN and infinity are none either.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pecker_fast.errors import ModelError

_NAMED = 5  # names of a set that a message lists
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


class Spec(NamedTuple):
    """`fits` says whether a value is one of `expected`."""

    expected: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Spec:
    """A whole number, written as one."""
    return Spec(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Spec:
    """A finite number; bounds belong to it."""

    def fits(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and math.isfinite(value)

    return Spec(f"a number from {low:g} to {high:g}", fits)


def one_of(*names: str) -> Spec:
    listed = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return Spec(f"one of {listed}", lambda value: isinstance(value, str) and value in names)


def list_of(spec: Spec, least: int = 1, most: int = 64) -> Spec:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all(map(spec.fits, value))

    length = f"{least}" if least == most else f"{least} to {most}"
    return Spec(f"a list ({length} long), each {spec.expected}", fits)


def either(*specs: Spec) -> Spec:
    return Spec(" or ".join(spec.expected for spec in specs), lambda value: any(spec.fits(value) for spec in specs))


def optional(spec: Spec) -> Spec:
    return either(spec, NULL)


NULL = Spec("null", lambda value: value is None)
TEXT = Spec("a text", lambda value: isinstance(value, str) and len(value) <= 1000)
FLAG = Spec("true or false", lambda value: value is None or isinstance(value, bool))  # null is false, as in old configs
OBJECT = Spec("an object", lambda value: isinstance(value, dict))


def check_values(path: Path, config: Mapping[str, Any], specs: Mapping[str, Spec]) -> None:
    """Raise ModelError, naming file, key, value and what is expected, for the first value that does not fit; keys without a
    spec are left alone."""
    for key, spec in specs.items():
        if key in config and not spec.fits(config[key]):
            raise ModelError(f"{path}: {key} is {shown(config[key])}; expected {spec.expected}")


def shown(value: Any) -> str:
    """A foreign value, short enough for a message."""
    names = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool) or value is None:
        return names[value]
    return _SHOWN.repr(value)[:80]
