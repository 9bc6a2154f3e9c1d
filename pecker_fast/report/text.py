"""Numbers as people read them, and the before/after table of the console."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pecker_fast.evaluate import share, verdict_of

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("before", "after", "teacher")
NONE = "–"


class Row(NamedTuple):
    """One metric: its key in metrics.json, its name, which way is better, and what it says."""

    key: str
    name: str
    better: str  # "↑" | "↓"
    says: str
    fraction: bool


ROWS = (
    Row("ua", "Unlearning accuracy", "↑", "forget samples no longer judged to be their class", True),
    Row("cover_rate", "Cover rate", "↑", "forget samples judged to be the cover class", True),
    Row("retain_accuracy", "Retain accuracy", "↑", "samples of the other classes judged as conditioned", True),
    Row("fid", "FID", "↓", "retain samples against real ones, in the judge's features", False),
    Row("inception_score", "Inception score", "↑", "of the retain samples, by the judge", False),
    Row("obeyed_all", "Other words obeyed", "↑", "forget samples that show all other words of their prompt", True),
    Row("ira", "In-domain retain accuracy", "↑", "retain samples: other words of the forgotten word's kind", True),
    Row("cra", "Cross-domain retain accuracy", "↑", "retain samples: words of all other kinds", True),
    Row("precision", "Precision", "↑", "retain samples that lie among the real ones", True),
    Row("recall", "Recall", "↑", "real samples that lie among the retain samples", True),
)


WORDS = ("obeyed_all", "ira", "cra")  # of prompts; classes have none
CLASSES = ("inception_score",)
UNCOUNTED = ("precision", "recall")  # shares whose number of samples is not that of a group


def rows_of(metrics: Mapping[str, Any]) -> list[Row]:
    """The rows that these metrics can have: those of prompts, or those of classes."""
    words = any(key in section(metrics, column) for column in COLUMNS for key in WORDS)
    return [row for row in ROWS if row.key not in (CLASSES if words else WORDS)]


def number(value: Any) -> float | None:
    """`value` as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def section(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping under `key`, empty when there is none."""
    found = metrics.get(key)
    return dict(found) if isinstance(found, Mapping) else {}


def figure(value: Any, fraction: bool) -> str:
    """A metric as text: 0.9812 → "98.1 %", 12.3456 → "12.35", None → "–"."""
    x = number(value)
    if x is None:
        return NONE
    if fraction:
        return f"{100 * x:.1f} %" if not 0.9995 <= x < 1 else "> 99.9 %"  # nothing is rounded up to 100 %
    return f"{x:.2f}" if abs(x) < 1000 else f"{x:,.0f}"


def interval(figures: Mapping[str, Any], key: str) -> str:
    """The 95 % interval of a share as text, "–" where it has none: "97.3–98.7 %"."""
    found = share(figures, key)
    return NONE if found is None else f"{100 * found.low:.1f}–{100 * found.high:.1f} %"


def verdict_line(metrics: Mapping[str, Any], steps: Any = None) -> str:
    """Whether it may be said that something was forgotten, as one sentence. steps: of the recipe, where metrics do not tell."""
    known = metrics.get("forget_steps", steps)
    line = verdict_of(metrics, known if isinstance(known, int) else None).line()
    return line[0].upper() + line[1:]


def ratio(metrics: Mapping[str, Any], column: str = "after") -> float | None:
    """FID of `column` over the teacher's multi-step FID, None where one is missing."""
    mine, teacher = number(section(metrics, column).get("fid")), number(section(metrics, "teacher").get("fid"))
    return mine / teacher if mine is not None and teacher else None


def judge_line(metrics: Mapping[str, Any]) -> str:
    """What is known about the judge, as one sentence; empty when nothing is."""
    judge = section(metrics, "judge")
    parts = []
    if number(judge.get("held_out_accuracy")) is not None:
        parts.append(f"judge {figure(judge['held_out_accuracy'], True)} right on held-out images")
    if number(judge.get("teacher_accuracy")) is not None:
        parts.append(f"teacher's multi-step samples {figure(judge['teacher_accuracy'], True)} as conditioned")
    if number(judge.get("fid_floor")) is not None:
        parts.append(f"FID of real against real {figure(judge['fid_floor'], False)}")
    if number(judge.get("reference_samples")) is not None:
        parts.append(f"{judge['reference_samples']:,} reference samples")
    return "; ".join(parts)


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """The content of metrics.json as a rich table, before · after · teacher; missing figures are dashes.

    A rich Console prints it, as plain text where there is no terminal.
    """
    from rich.table import Table

    lines = [verdict_line(metrics), *blanks(metrics), judge_line(metrics)]
    table = Table(caption="\n".join(filter(None, lines)), caption_justify="left")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right", style="bold" if column == "after" else "")
    for row in rows_of(metrics):
        values = [figure(section(metrics, column).get(row.key), row.fraction) for column in COLUMNS]
        table.add_row(f"{row.name} {row.better}", *values)
        between = [interval(section(metrics, column), row.key) for column in COLUMNS] if row.fraction else []
        if set(between) - {NONE} and row.key not in UNCOUNTED:
            table.add_row("  95 % interval", *between, style="dim")
        if row.key == "fid" and ratio(metrics) is not None:
            table.add_row("FID / teacher's ↓", *(times(ratio(metrics, column)) for column in COLUMNS))
    for key, name in (("samples", "Samples of each group"), ("seed", "Seed")):
        counts = [count(section(metrics, column).get(key)) for column in COLUMNS]
        if set(counts) - {NONE}:
            table.add_row(name, *counts)
    return table


def blanks(metrics: Mapping[str, Any]) -> list[str]:
    """Why columns are empty, a line each."""
    return [f"{column}: {why}" for column, why in section(metrics, "blank").items()]


def times(value: float | None) -> str:
    """1.234 → "1.23 ×"."""
    return NONE if value is None else f"{value:.2f} ×"


def seconds(value: Any) -> str:
    """112.3 → "1 min 52 s"."""
    x = number(value)
    if x is None:
        return NONE
    if x < 60:
        return f"{x:.1f} s"
    whole = round(x)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def scaled(value: Any, unit: str, base: int = 1000) -> str:
    """2.5e12, "FLOP" → "2.50 TFLOP"; base 1024 gives KiB, MiB, ..."""
    x = number(value)
    if x is None:
        return NONE
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    power = 0
    while abs(x) >= base and power < len(prefixes) - 1:
        x, power = x / base, power + 1
    return f"{x:,.0f} {unit}" if power == 0 else f"{x:.3g} {prefixes[power]}{unit}"


def count(value: Any) -> str:
    """64000 → "64,000"."""
    x = number(value)
    return NONE if x is None else f"{x:,.0f}"
