"""May it be said that a model has forgotten? Only where it was judged so, with the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pecker_fast.evaluate.intervals import wilson

LEVEL = 0.9  # unlearning accuracy that the whole interval must lie above
Kind = Literal["forgotten", "seen", "unseen before", "not judged", "not trained"]


@dataclass(frozen=True)
class Verdict:
    """What the figures allow to be said. `forgotten`: after at least one step UA's 95 % interval lies above UA before and above
    `LEVEL`. figures: UA with its interval, samples and UA before; empty where nothing was judged."""

    kind: Kind
    figures: str = ""
    still: str = ""  # share of forget samples in which the judge sees what was to be forgotten

    def said_of(self, what: str) -> str:
        """Half a sentence that goes after "a generator that": what is forgotten is named in the reader's words."""
        if self.kind == "forgotten":
            return f"has forgotten {what}"
        if self.kind == "not trained":
            return f"was not trained to forget {what} (0 steps)"
        trained = f"was trained to forget {what}"
        if self.kind == "not judged":
            return f"{trained} (not judged)"
        if self.kind == "seen":
            return f"{trained}; the judge still sees it in {self.still}"
        return f"{trained}; the judge hardly saw it before either"

    def line(self) -> str:
        """One sentence for a table or page, without its full stop."""
        said = {
            "forgotten": "judged forgotten",
            "not trained": "nothing was trained to be forgotten (0 steps)",
            "not judged": "trained to forget, not judged",
            "seen": f"trained to forget; the judge still sees it in {self.still} of the forget samples",
            "unseen before": "trained to forget; the judge hardly saw it before either",
        }[self.kind]
        return f"{said}: {self.figures}" if self.figures else said


def verdict_of(metrics: Mapping[str, Any] | None, steps: int | None = None) -> Verdict:
    """The verdict on `after` of these metrics. steps: of forgetting; None = as recorded there, else taken to be some."""
    metrics = metrics or {}
    after, before = _figures(metrics, "after"), _figures(metrics, "before")
    steps = metrics.get("forget_steps") if steps is None else steps
    ua, was = share(after, "ua"), share(before, "ua")
    figures = ""
    if ua is not None:
        figures = f"UA {ua.text()} of {after.get('samples')} samples" + (
            f", {_percent(was.value)} before" if was else ""
        )
    still = "" if ua is None else _percent(1 - ua.value)
    if steps == 0:
        return Verdict("not trained", figures, still)
    if ua is None:
        return Verdict("not judged")
    if ua.low <= LEVEL or was is None:
        return Verdict("seen", figures, still)
    return Verdict("forgotten" if ua.low > was.value else "unseen before", figures, still)


@dataclass(frozen=True)
class Interval:
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float

    def opposite(self) -> Interval:
        """Of the share that is left."""
        return Interval(1 - self.value, 1 - self.high, 1 - self.low)

    def text(self) -> str:
        return f"{_percent(self.value)} ({100 * self.low:.1f}–{_percent(self.high)})"


def share(figures: Mapping[str, Any], key: str) -> Interval | None:
    """A share of a row of figures with the interval that stands beside it, else the one its number of samples gives."""
    value, samples = figures.get(key), figures.get("samples")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    intervals = figures.get("intervals")
    found = intervals.get(key) if isinstance(intervals, Mapping) else None
    if not (isinstance(found, list | tuple) and len(found) == 2):
        found = wilson(value * samples, samples) if isinstance(samples, int) and samples > 0 else None
    return Interval(float(value), *map(float, found)) if found is not None else None


def _figures(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = metrics.get(name)
    return found if isinstance(found, Mapping) else {}


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"
