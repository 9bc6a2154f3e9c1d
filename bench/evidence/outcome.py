"""What one run came to, and what can be said of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evidence import plan

RESAMPLES = 10_000
IMAGES_PER_ITERATION = 4 * plan.BATCH_SIZE  # retain and forget halves of the score step and of the generator step


@dataclass(frozen=True)
class Outcome:
    """Figures of one run; nan where there is none (UA never reached, not relearned)."""

    pair: tuple[int, int]
    seed: int
    images: float  # one-step samples drawn until UA ≥ 99 %, without those of the mask
    seconds: float  # until then, mask included
    fid_then: float
    fid_end: float
    fid_worst: float
    ua_end: float
    ua_lowest: float  # after it was first reached
    cover_end: float
    relearn: float  # iterations until the class is back; infinity: not within the budget


def outcome_of(run: dict[str, Any], timing: dict[str, float] | None) -> Outcome:
    """timing: {"iteration_ms": …, "mask_s": …} of the arm, None = not measured."""
    history, nan = run["history"], math.nan
    reached = next((h for h in history if h["ua"] >= plan.UA_BAR), None)
    after = [h["ua"] for h in history if reached is not None and h["step"] >= reached["step"]]
    fids = [math.inf if h["fid"] is None else h["fid"] for h in history]
    seconds = nan
    if reached is not None and timing is not None:
        seconds = timing["mask_s"] + reached["step"] * timing["iteration_ms"] / 1e3
    relearn = nan if "relearn" not in run else math.inf if run["relearn"] is None else float(run["relearn"])
    last = run["last"]
    return Outcome(
        (run["pair"][0], run["pair"][1]), run["seed"],
        images=reached["step"] * IMAGES_PER_ITERATION if reached else nan, seconds=seconds,
        fid_then=reached["fid"] if reached else nan, fid_end=math.inf if last["fid"] is None else last["fid"], fid_worst=max(fids),
        ua_end=last["ua"], ua_lowest=min(after) if after else nan, cover_end=last["cover"], relearn=relearn,
    )  # fmt: skip


@dataclass(frozen=True)
class Metric:
    head: str
    read: Callable[[Outcome], float]
    format: Callable[[float], str]
    compared: bool = True

    def show(self, found: tuple[float, float, float, int, int]) -> str:
        low, mean, high, n, total = found
        if not n:
            return "–"
        missing = f" [{n} of {total}]" if n < total else ""
        return f"{self.format(mean)} ({self.format(low)} … {self.format(high)}){missing}"


METRICS = (
    Metric("images to UA ≥ 99 %", lambda o: o.images, lambda v: f"{v:,.0f}"),
    Metric("seconds", lambda o: o.seconds, lambda v: f"{v:.1f}"),
    Metric("retain FID then", lambda o: o.fid_then, lambda v: f"{v:.3f}"),
    Metric("at the end", lambda o: o.fid_end, lambda v: f"{v:.3f}"),
    Metric("worst on the way", lambda o: o.fid_worst, lambda v: f"{v:.3f}"),
    Metric("UA % at the end", lambda o: 100 * o.ua_end, lambda v: f"{v:.2f}", compared=False),
    Metric("lowest UA % after 99", lambda o: 100 * o.ua_lowest, lambda v: f"{v:.2f}", compared=False),
    Metric("cover % at the end", lambda o: 100 * o.cover_end, lambda v: f"{v:.1f}"),
    Metric("iterations to relearn", lambda o: o.relearn, lambda v: f"{v:.0f}"),
)


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """(2.5 %, mean, 97.5 %) of the mean of `values` under resampling; deterministic."""
    x = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    means = x[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, float(x.mean()), high


def interval(values: Sequence[float]) -> tuple[float, float, float, int, int]:
    """(low, mean, high, finite values, values that were looked for) over the runs that have a finite value."""
    looked = [v for v in values if not math.isnan(v)] or list(values)
    finite = [v for v in values if math.isfinite(v)]
    total = len(values) if any(math.isnan(v) for v in values) and len(finite) == len(looked) else len(looked)
    return (*bootstrap(finite), len(finite), total) if finite else (math.nan, math.nan, math.nan, 0, len(values))


def paired(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], read: Callable[[Outcome], float]
) -> tuple[float, float, float, int]:
    """Bootstrap of ours − theirs over the (pair, seed) both have a finite value for, and how many these are."""
    other = {(o.pair, o.seed): read(o) for o in theirs}
    both = [read(o) - other[o.pair, o.seed] for o in ours if (o.pair, o.seed) in other]
    finite = [d for d in both if math.isfinite(d)]
    return (*bootstrap(finite), len(finite)) if finite else (math.nan, math.nan, math.nan, 0)
