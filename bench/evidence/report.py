"""From the results of all runs to bench/results/study.json, the tables of docs/evidence.md and its figures."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evidence import plan
from evidence.outcome import METRICS, Outcome, interval, outcome_of, paired
from evidence.plan import Arm
from evidence.stages import STAGES, read

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "study.json"
DOC = ROOT / "docs" / "evidence.md"
PICTURES = ROOT / "docs" / "figures"
Runs = list[dict[str, Any]]


def collect(runs: Path) -> None:
    """One file with the result of every run, and what each arm costs an iteration (`time.json`)."""
    stages = {name: [read(path) for path in sorted((runs / name).glob("*.json"))] for name in STAGES}
    head = {
        "command": "python bench/study.py run; python bench/study.py time; python bench/study.py collect",
        "machine": {"cpu_count": torch.get_num_threads(), "platform": platform.machine(), "torch": torch.__version__},
        "settings": {"batch_size": plan.BATCH_SIZE, "tile": plan.TILE, "mask_samples": plan.MASK_SAMPLES},
    }
    timing = read(runs / "time.json") if (runs / "time.json").is_file() else {}
    RESULT.write_text(json.dumps(_tidy({**head, "time": timing, **stages})) + "\n")
    print(RESULT.relative_to(ROOT))


def _tidy(value: Any) -> Any:
    """Numbers with five figures, infinity as null (JSON has none)."""
    if isinstance(value, dict):
        return {key: _tidy(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def figures() -> None:
    """Write the tables between the markers of docs/evidence.md, and the pictures beside it."""
    from evidence.pictures import draw

    study = json.loads(RESULT.read_text())
    text = DOC.read_text()
    for name, lines in tables(study).items():
        block = f"<!-- study:{name} -->\n{lines}\n<!-- /study:{name} -->"
        text = re.sub(rf"<!-- study:{name} -->.*?<!-- /study:{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    DOC.write_text(text)
    draw(study, outcomes(study, "final"), PICTURES)
    print(DOC.relative_to(ROOT), PICTURES.relative_to(ROOT))


def outcomes(study: dict[str, Any], stage: str) -> dict[Arm, list[Outcome]]:
    found: dict[Arm, list[Outcome]] = {}
    for run in study[stage]:
        arm = Arm(**run["arm"])
        found.setdefault(arm, []).append(outcome_of(run, study["time"].get(arm.name)))
    return found


def tables(study: dict[str, Any]) -> dict[str, str]:
    """Markdown by marker name."""
    final, one_stage = outcomes(study, "final"), outcomes(study, "one_stage")
    return {
        "screen": screen_table(study["screen"]),
        "refine": screen_table(study["refine"]),
        "final": final_table(final),
        "paired": paired_table(final),
        "pairs": final_table(_by_pair(final), titled=True),
        "one_stage": final_table(one_stage),
        "one_stage_paired": paired_table(one_stage),
        "skipped": ", ".join(f"`{arm.label}`" for arm in plan.skipped()),
    }


def _by_pair(found: dict[Arm, list[Outcome]]) -> dict[Any, list[Outcome]]:
    return {
        (f"{pair[0]} → {pair[1]}", arm): [o for o in runs if o.pair == pair]
        for pair in plan.PAIRS
        for arm, runs in found.items()
    }


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def screen_table(runs: Runs) -> str:
    """Arms by the objective of their best settings at the last rung."""
    heads = [
        "arm",
        "J",
        "lr θ / ψ",
        "g_f",
        "warm-up",
        "iteration",
        "UA %",
        "cover %",
        "retain FID",
        "UA % at the first rung",
    ]
    rows = []
    for run in sorted(runs, key=lambda r: r["history"][r["best"]][-1]["objective"]):
        best, config = run["history"][run["best"]], run["configs"][run["best"]]
        last = best[-1]
        rates = f"{config['lr']:.2g} / {config['lr_score']:g}"
        settings = [rates, f"{config['forget']:g}", f"{config['warmup']}", f"{last['step']}"]
        found = [
            f"{100 * last['ua']:.1f}",
            f"{100 * last['cover']:.1f}",
            f"{last['fid']:.3f}",
            f"{100 * best[0]['ua']:.1f}",
        ]
        rows.append([Arm(**run["arm"]).label, f"{last['objective']:.2f}", *settings, *found])
    return markdown(heads, rows)


def final_table(found: dict[Any, list[Outcome]], titled: bool = False) -> str:
    """Means over runs with 95 % bootstrap intervals."""
    heads = [*(["pair"] if titled else []), "arm", "runs", *(m.head for m in METRICS)]
    rows = []
    for key, runs in found.items():
        if not runs:
            continue
        words = [*list(key[:1]), key[1].label] if titled else [key.label]
        rows.append([*words, str(len(runs)), *(m.show(interval([m.read(o) for o in runs])) for m in METRICS)])
    return markdown(heads, rows)


def paired_table(found: dict[Arm, list[Outcome]]) -> str:
    """Arm minus another arm on the same pair and seed: mean difference with its 95 % bootstrap interval; bold where the
    interval leaves 0 out."""
    heads = ["arm", "against", *(m.head for m in METRICS if m.compared)]
    rows = []
    for arm, runs in found.items():
        others = [o for o in found if o.score == "none" and o != arm]
        others += [o for o in (arm.twin(),) if o in found and o != arm]
        for other in others:
            cells = []
            for m in METRICS:
                if not m.compared:
                    continue
                low, mean, high, n = paired(runs, found[other], m.read)
                text = f"{m.format(mean)} ({m.format(low)} … {m.format(high)})" if n else "–"
                cells.append(f"**{text}**" if n and (low > 0 or high < 0) else text)
            rows.append([arm.label, other.label, *cells])
    return markdown(heads, rows)
