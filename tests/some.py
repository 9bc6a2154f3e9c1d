"""Of a test's many cases those that `make test` runs: the first, the last and those evenly between. `make test-all` runs all."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


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
