"""Shares with their 95 % intervals, and the dictionaries of figures made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

_Z = NormalDist().inv_cdf(0.975)


def wilson(hits: float, n: float) -> tuple[float, float] | None:
    """95 % interval of the share `hits` / `n` (Wilson 1927), inside [0, 1]; None where n is 0.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n) with p = hits/n: of use at 0 and at 1 too, where p ± z·s.e. says
    that nothing is uncertain. `hits` need not be whole: a share of words can be given over the number of images.
    """
    if not n:
        return None
    assert 0 <= hits <= n
    p, z2 = hits / n, _Z * _Z / n
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    low, high = (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)
    return (0.0 if hits == 0 else max(0.0, low), 1.0 if hits == n else min(1.0, high))


@dataclass
class Share:
    """`hits` of `n`. Several things counted in one image go together: `images` is then the n of the interval."""

    hits: int = 0
    n: int = 0
    images: int | None = None

    def add(self, hit: bool) -> None:
        """Count one more, seen or not."""
        self.hits += bool(hit)
        self.n += 1

    @property
    def value(self) -> float | None:
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> list[float] | None:
        images = self.n if self.images is None else self.images
        found = wilson(self.hits / self.n * images, images) if self.n else None
        return None if found is None else list(found)


def figures(shares: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `shares` (a Share, or a mapping of them, by name), and under "intervals" their intervals by the same keys.

    A share of nothing is None, and so is its interval. The result survives JSON unchanged.
    """
    return {**_each(shares, "value"), "intervals": _each(shares, "interval")}


def _each(shares: Mapping[str, Any], what: str) -> dict[str, Any]:
    return {
        name: getattr(share, what) if isinstance(share, Share) else _each(share, what) for name, share in shares.items()
    }
