"""Of a test's many cases those that `make test` runs: the first, the last and those evenly between. `make test-all` runs all,
and ten times as many generated ones."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def counts(number: int) -> Any:
    """A test of so many examples (`count`), and a slow one of ten times as many."""
    return pytest.mark.parametrize("count", [number, pytest.param(10 * number, marks=pytest.mark.slow)])


def generated(count: int, test: Callable[..., None], *arguments: Any, **strategies: Any) -> None:
    """Hypothesis on `test`, so many times."""
    settings(max_examples=count, **QUICK)(given(*arguments, **strategies)(test))()


def spread(cases: Sequence[Any], count: int) -> list[Any]:
    """`count` of the cases, evenly; one: the last, the richest as cases are written."""
    if count >= len(cases):
        return list(cases)
    if count == 1:
        return [cases[-1]]
    return [cases[i * (len(cases) - 1) // (count - 1)] for i in range(count)]


def by_test(items: Sequence[Any]) -> dict[str, list[Any]]:
    """pytest's items under the name of their test, without parameters."""
    found = defaultdict(list)
    for item in items:
        found[item.nodeid.partition("[")[0]].append(item)
    return found
