"""The results of a check as tables, and which goals they reach.

    make gpu-report
    python bench/gpu/report.py [--input bench/results/gpu] [--write docs/performance.md]

A goal is a ratio, a rate or a time; one without its figures is "not measured". With --write the tables go between
<!-- gpu:tables --> and <!-- /gpu:tables -->.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench" / "gpu")]

from rows import read  # noqa: E402

Rows = Mapping[str, Mapping[str, Any]]  # by what was measured, the last row of each
NONE = "–"


@dataclass(frozen=True)
class Goal:
    """value: of the rows, None where one is missing. least: whether more is better. solid, far: what it is to be."""

    name: str
    value: Callable[[Rows], float | None]
    solid: float
    far: float
    least: bool = True
    unit: str = "×"


def time_of(rows: Rows, what: str) -> float | None:
    """Milliseconds of the device, or of the host where there was no graph."""
    row = rows.get(what, {})
    found = row.get("device_ms")
    return found if isinstance(found, float) else row.get("host_ms")


def ratio(slow: str, fast: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        a, b = time_of(rows, slow), time_of(rows, fast)
        return a / b if a and b else None

    return value


def figure(what: str, key: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.get(what, {}).get(key)


def share_of_copy(what: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        ours, copy = rows.get(what, {}).get("tb_s"), rows.get("copy", {}).get("tb_s")
        return 100 * ours / copy if ours and copy else None

    return value


FUSED = "torch fused (0.9, 0.999)"
SD15, SDXL = "half-normal 859520964 0.1", "half-normal 2567463684 0.1"
GOALS = (
    Goal("dense step, share of the copy bandwidth", share_of_copy("dense (0.9, 0.999)"), 90, 95, unit="%"),
    Goal(
        "dense step without a first moment, against torch fused",
        ratio("torch fused (0.0, 0.999)", "dense (0.0, 0.999)"),
        1.3,
        1.4,
    ),
    *(
        Goal(
            f"element mask {d}, against torch fused dense", ratio(FUSED, f"masked element {d}, as shipped"), solid, far
        )
        for d, solid, far in ((0.5, 1.2, 1.4), (0.1, 2.3, 3.2), (0.01, 10, 18))
    ),
    *(
        Goal(f"row mask {d}, against torch fused dense", ratio(FUSED, f"masked row {d}, as shipped"), solid, far)
        for d, solid, far in ((0.1, 8, 9.5), (0.01, 40, 70))
    ),
    Goal("threshold of 860 M, against topk", ratio(f"topk {SD15}", f"threshold {SD15}"), 5, 8),
    Goal("threshold of 860 M, against sort", ratio(f"sort {SD15}", f"threshold {SD15}"), 30, 60),
    Goal("threshold of 2.57e9", figure(f"threshold {SDXL}", "host_ms"), 4, 3, least=False, unit="ms"),
    *(
        Goal(
            f"tiles {d}, 8192 1280x1280, against a whole product",
            ratio("whole gradient 8192 1280x1280", f"tiles 8192 1280x1280 {d}"),
            solid,
            far,
        )
        for d, solid, far in ((1.0, 0.8, 0.92), (0.25, 2.8, 3.4), (0.1, 6, 8))
    ),
    Goal("average", figure("average", "device_ms"), 2.6, 2.4, least=False, unit="ms"),
)


def latest(rows: list[dict[str, Any]]) -> Rows:
    return {row["what"]: row for row in rows if "what" in row}


def judged(goal: Goal, rows: Rows) -> tuple[str, str]:
    """(value, word)."""
    value = goal.value(rows) if rows else None
    if value is None:
        return NONE, "not measured"
    reaches = [value >= bound if goal.least else value <= bound for bound in (goal.solid, goal.far)]
    return f"{value:.3g} {goal.unit}", "beyond" if reaches[1] else "met" if reaches[0] else "missed"


def tables(rows: list[dict[str, Any]]) -> str:
    """Machine, stages, goals, times, iterations, in Markdown."""
    known = latest(rows)
    blocks = [_machine(rows)]
    blocks.append(_table(["stage", "result", "s"], [_stage(row) for row in rows if "stage" in row]))
    failed = [row["smoke"] for row in rows if row.get("ok") is False]
    if failed:
        blocks.append(f"Failed in smoke: {', '.join(failed)}.")
    heads = ["goal", "to reach", "moonshot", "measured", ""]
    dry = any(row.get("device") == "cpu" for row in rows)  # a dry run measures nothing
    goals = [[g.name, f"{g.solid:g} {g.unit}", f"{g.far:g} {g.unit}", *judged(g, {} if dry else known)] for g in GOALS]
    blocks.append(_table(heads, goals))
    blocks.append(_table(["what", "device, ms", "with host, ms", "TB/s", "of the copy"], _times(known)))
    medians = [row for what, row in known.items() if what.endswith(": median")]
    names = ["iteration", "ms", "images/s", "TFLOP/s", "MFU", "peak, GiB", "predicted, GiB"]
    keys = ("ms", "images_s", "tflops", "mfu", "peak_gib", "predicted_gib")
    lines = [[row["what"].removesuffix(": median"), *(_number(row.get(key)) for key in keys)] for row in medians]
    blocks.append(_table(names, lines))
    digits = [
        [row["what"], _number(row.get("wall_s")), _number(_training(row))]
        for w, row in known.items()
        if w.startswith("train digits")
    ]
    blocks.append(_table(["command", "wall, s", "training, s"], digits))
    return "\n\n".join(block for block in blocks if block)


def _machine(rows: list[dict[str, Any]]) -> str:
    row = next((row for row in rows if "versions" in row), {})
    versions = ", ".join(f"{name} {version}" for name, version in (row.get("versions") or {}).items() if version)
    gpu = next((row["gpu"] for row in rows if "gpu" in row), "")
    return (
        "; ".join(part for part in (str(row.get("device", "")), gpu, f"Python {row.get('python')}", versions) if part)
        + "."
    )


def _stage(row: dict[str, Any]) -> list[str]:
    result = "skipped: no time left" if "skipped" in row else {0: "passed"}.get(row["rc"], f"failed ({row['rc']})")
    return [row["stage"], result, _number(row.get("s"))]


def _times(known: Rows) -> list[list[str]]:
    copy = known.get("copy", {}).get("tb_s")
    lines = []
    for what, row in known.items():
        if "error" in row:
            lines.append([what, row["error"], NONE, NONE, NONE])
        elif "host_ms" in row and not what.startswith("iteration"):
            device = row.get("device_ms")
            share = f"{100 * row['tb_s'] / copy:.0f} %" if copy and row.get("tb_s") else NONE
            lines.append(
                [
                    what,
                    _number(device if isinstance(device, float) else None),
                    _number(row["host_ms"]),
                    _number(row.get("tb_s")),
                    share,
                ]
            )
    return lines


def _training(row: Mapping[str, Any]) -> float | None:
    return ((row.get("metrics") or {}).get("cost") or {}).get("training_s")


def _number(value: Any) -> str:
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(heads: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if not (options.input / "results.jsonl").is_file():
        print(
            f"error: {options.input}: no results; make gpu-check writes them on a machine with a GPU", file=sys.stderr
        )
        return 2
    rows = read(options.input)
    text = tables(rows)
    print(text)
    if options.write is not None:
        block = f"<!-- gpu:tables -->\n{text}\n<!-- /gpu:tables -->"
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(
            re.sub(r"<!-- gpu:tables -->.*?<!-- /gpu:tables -->", lambda _: block, page, flags=re.S), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
