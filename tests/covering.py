"""Covering arrays: few rows of settings in which every allowed pair of values stands at least once.

`values` lists the values of each key, the plain one first. A pair counts where both its values do something: `needs` names, for
a key, the values of other keys without which it is idle.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice, product
from typing import Any, NamedTuple

CANDIDATES = 3  # rows of which the best is taken
Row = dict[str, int]  # key -> index of its value
Item = tuple[str, int]
Pair = tuple[Item, Item]  # in the order of the keys
Choice = Mapping[str, Sequence[Any]]  # key -> some of its values


class Refused(NamedTuple):
    """A combination that no row may hold: one of the values of every key of `when`; `why`: the words of its refusal."""

    when: Choice
    why: str  # a regular expression

    def cases(self) -> Iterator[dict[str, Any]]:
        for chosen in product(*self.when.values()):
            yield dict(zip(self.when, chosen))


class Space:
    """What rows are made of; `all_refused`: the refusals as they were given."""

    def __init__(
        self, values: Choice, refused: Sequence[Refused] = (), needs: Mapping[str, Choice] | None = None
    ) -> None:
        self.values, self.all_refused = values, refused
        self.place = {key: i for i, key in enumerate(values)}
        self.needs = {key: self._indices(choice) for key, choice in (needs or {}).items()}
        self.switches = {other for choice in self.needs.values() for other in choice}
        self.refused: dict[str, list[dict[str, set[int]]]] = {}
        for one in refused:
            indices = self._indices(one.when)
            for key in indices:
                self.refused.setdefault(key, []).append(indices)

    def _indices(self, choice: Choice) -> dict[str, set[int]]:
        found = {}
        for key, chosen in choice.items():
            kinds = [(type(value), value) for value in self.values[key]]
            found[key] = {kinds.index((type(value), value)) for value in chosen}
        return found

    def indices(self, told: Mapping[str, Any]) -> Row:
        """A row of values as one of their places."""
        return {key: min(found) for key, found in self._indices({key: [value] for key, value in told.items()}).items()}

    def pairs(self) -> set[Pair]:
        items = [[(key, i) for i in range(len(values))] for key, values in self.values.items()]
        return {pair for a, b in combinations(items, 2) for pair in product(a, b)}

    def pair(self, a: Item, b: Item) -> Pair:
        return (a, b) if self.place[a[0]] < self.place[b[0]] else (b, a)

    def allows(self, row: Row, key: str) -> bool:
        """Whether nothing is refused that the key of a row takes part in."""
        return not any(
            all(row.get(other) in chosen for other, chosen in one.items()) for one in self.refused.get(key, ())
        )

    def possible(self, pair: Pair) -> bool:
        """Whether nothing refuses a pair beside what its keys do nothing without, where that is one value."""
        row = dict(pair)
        for key, _ in pair:
            for other, (first, *more) in ((other, sorted(found)) for other, found in self.needs.get(key, {}).items()):
                if not more:
                    row.setdefault(other, first)
        return all(self.allows(row, key) for key in row)

    def live(self, row: Row, key: str, beside: str) -> bool:
        """Whether a key does something in a row, as far as the row goes; but for what `beside` says, its partner in a pair."""
        needs = self.needs.get(key, {})
        return all(other == beside or row.get(other, -1) in {-1, *chosen} for other, chosen in needs.items())

    def covered(self, row: Row) -> set[Pair]:
        waiting = {
            key: self._waiting(row, key) for key in self.values
        }  # for what else than its partner it does nothing
        alive = [key for key in self.values if not waiting[key]]
        found = {((a, row[a]), (b, row[b])) for a, b in combinations(alive, 2)}
        for key, others in waiting.items():
            if len(others) == 1 and waiting[other := others[0]] in ([], [key]):
                found.add(self.pair((key, row[key]), (other, row[other])))
        return found

    def _waiting(self, row: Row, key: str) -> list[str]:
        return [other for other, chosen in self.needs.get(key, {}).items() if row[other] not in chosen]


def covering(space: Space, seed: int = 0, tries: int = 20) -> tuple[list[dict[str, Any]], set[Pair]]:
    """(rows, pairs that stand in none of them because no row of `tries` could hold them)."""
    draw = random.Random(seed)
    never = {pair for pair in space.pairs() if not space.allows(dict(pair), pair[0][0])}
    left = space.pairs() - never
    rows: list[Row] = []
    while left:
        pair = draw.choice(sorted(left))
        made = list(islice(filter(None, (_row(space, pair, left, draw) for _ in range(tries))), CANDIDATES))
        if not made:
            never.add(pair)
            left.discard(pair)
            continue
        covered = [space.covered(row) & left for row in made]
        best = max(range(len(made)), key=lambda i: len(covered[i]))
        rows.append(made[best])
        left -= covered[best]
    return [{key: space.values[key][row[key]] for key in space.values} for row in rows], never


def _row(space: Space, pair: Pair, left: set[Pair], draw: random.Random) -> Row | None:
    """An allowed row in which a pair counts, greedy for pairs that are left; None where it came to no end."""
    row, (a, b) = dict(pair), (pair[0][0], pair[1][0])
    rest = [key for key in space.values if key not in row]
    draw.shuffle(rest)
    rest.sort(key=lambda key: key not in space.switches)  # what others hang on comes first
    for key in rest:
        best: tuple[float, int] | None = None
        for i in range(len(space.values[key])):
            row[key] = i
            if space.allows(row, key) and space.live(row, a, b) and space.live(row, b, a):
                gain = _gain(space, row, key, left) + draw.random()
                best = max(best or (gain, i), (gain, i))
        if best is None:
            return None
        row[key] = best[1]
    return row


def _gain(space: Space, row: Row, key: str, left: set[Pair]) -> int:
    item = (key, row[key])
    others = (other for other in row.items() if other[0] != key and space.pair(item, other) in left)
    return sum(space.live(row, key, other) and space.live(row, other, key) for other, _ in others)
