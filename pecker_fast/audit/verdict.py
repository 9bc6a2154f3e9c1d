"""What a probe may be said to have shown: the result's interval against those of the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pecker_fast.evaluate import Interval, wilson

NOTHING = 0.05  # what the whole interval must lie below for "nothing comes back"
HOLDS, AS_IF, HIDES, UNTOLD = "holds", "as if never known", "hides", "cannot tell"
KEPT, LOST = "kept", "lost"
Kind = Literal["holds", "as if never known", "hides", "cannot tell", "kept", "lost"]


@dataclass(frozen=True)
class Verdict:
    """kind: in one word or four; why: the half sentence after it."""

    kind: Kind
    why: str


def interval(value: float, samples: int) -> Interval:
    """A share of so many samples with its 95 % interval."""
    low, high = wilson(min(samples, round(value * samples)), samples) or (0.0, 1.0)
    return Interval(value, low, high)


def hull(found: Sequence[Interval]) -> Interval | None:
    """From the lowest to the highest of several models that never knew: they differ among one another too."""
    if not found:
        return None
    return Interval(
        sum(one.value for one in found) / len(found), min(one.low for one in found), max(one.high for one in found)
    )


def verdict_on(result: Interval, ceiling: Interval | None, floor: Interval | None) -> Verdict:
    """ceiling: of the control that only hides. floor: of models that never knew; None = there is none."""
    if floor is not None and result.high < floor.low:
        return Verdict("holds", "less comes back than from a model that never knew it")
    if floor is None:
        if result.high <= NOTHING and ceiling is not None and ceiling.low > result.high:
            return Verdict("holds", "nothing comes back, and it does where the concept is only hidden")
        return Verdict("cannot tell", "there is no model that never knew to compare with")
    if ceiling is not None and floor.high >= ceiling.low:
        return Verdict("cannot tell", "a model that never knew gives back as much as one that only hides")
    if result.low > floor.high:
        if result.high <= NOTHING:
            return Verdict("holds", "next to nothing comes back, and it does where the concept is only hidden")
        return Verdict("hides", "more comes back than from a model that never knew it")
    return Verdict("as if never known", "not told apart from a model that never knew it")


def verdict_on_loss(result: Interval, before: Interval | None) -> Verdict:
    """Of a probe that counts what is lost."""
    if before is None:
        return Verdict("cannot tell", "the model before was not looked at")
    if result.low > before.high:
        return Verdict("lost", f"{100 * (result.value - before.value):.1f} points more are drawn wrong than before")
    return Verdict("kept", "not told apart from the model before")


def overall(kinds: Sequence[str]) -> str:
    """One line over all probes."""
    told = [kind for kind in kinds if kind in (HOLDS, AS_IF, HIDES)]
    if HIDES in told:
        return f"hidden, not forgotten: {told.count(HIDES)} of {len(told)} probes that can tell bring back more than is natural"
    if not told:
        return "no probe can tell whether this is forgotten or hidden"
    if all(kind == HOLDS for kind in told):
        return f"holds against all {len(told)} probes that can tell"
    return f"as if never known, or better, by all {len(told)} probes that can tell ({told.count(HOLDS)} hold)"
