"""The study's finalists again on text-to-image: does saliency beat a random mask, and no mask, where conditions are prompts?

python bench/text_study.py run       # tuning, then three seeds of every arm; goes on where it was stopped
python bench/text_study.py table     # bench/results/text_study.json and the tables of docs/evidence.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evidence.outcome import bootstrap
from evidence.pictures import COLOURS
from evidence.report import markdown
from matplotlib.figure import Figure

from pecker_fast.machine.hardware import environment
from pecker_fast.records.events import read_events

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "text_study.json"
DOC = ROOT / "docs" / "evidence.md"
PICTURE = ROOT / "docs" / "figures" / "text_study.png"
LIVE = ["update_rule=salient_only"]
FORGET_LOSS = ["mask.score=forget_loss", "mask.contrast=true"]
LORA = "forget_loss+ · element 0.03, score lora"
ARMS = {
    "forget_loss+ · element 0.03": ["mask.density=0.03", *FORGET_LOSS, *LIVE],
    "forget_loss+ · row 0.03": ["mask.density=0.03", "mask.structure=row", *FORGET_LOSS, *LIVE],
    "mse+ · row 0.1": ["mask.density=0.1", "mask.structure=row", "mask.score=mse", "mask.contrast=true", *LIVE],
    "random · element 0.03": ["mask.density=0.03", "mask.source=random", *LIVE],
    "no mask": ["mask.source=none"],
    LORA: ["mask.density=0.03", *FORGET_LOSS, *LIVE, "score=lora"],
}
RATES = {"no mask": (3e-5, 1e-4), LORA: ()}  # of θ; ψ's is the recipe's. The adapter takes its twin's
MASKED_RATES = (7e-4, 1.5e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
TUNING_STEPS, STEPS, JUDGE_EVERY = 30, 50, 10
BAR = 0.99
Task = tuple[str, str, list[str]]  # arm, name, overrides


def execute(task: Task, runs: Path) -> None:
    _, name, keys = task
    folder = runs / re.sub(r"\W+", "-", name)
    if finished(runs, name):
        return
    given = [f"evaluate.every={JUDGE_EVERY}", "evaluate.samples=300", "evaluate.final=0", "checkpoint.every=0"]
    command = [
        sys.executable,
        "-m",
        "pecker_fast",
        "train",
        "shapes_plain",
        *given,
        *keys,
        f"output={folder}",
        "--quiet",
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(name, short(history(runs, name)[-1]), flush=True)


def finished(runs: Path, name: str) -> bool:
    path = runs / re.sub(r"\W+", "-", name) / "metrics.json"
    return path.is_file() and "cost" in json.loads(path.read_text())


def short(event: dict[str, Any]) -> str:
    return f"UA {event['ua']:.3f} cover {event['cover_rate']:.3f} retain {event['retain_accuracy']:.3f} FID {event['fid']:.2f}"


def history(runs: Path, name: str) -> list[dict[str, Any]]:
    """Judgements on the way."""
    keys = ("step", "ua", "cover_rate", "retain_accuracy", "obeyed_all", "fid")
    events = read_events(runs / re.sub(r"\W+", "-", name) / "run.jsonl")
    return [{key: event[key] for key in keys} for event in events if event["event"] == "evaluate"]


def losses(runs: Path, name: str) -> list[dict[str, Any]]:
    """Losses on the way."""
    keys = ("step", "score_loss", "retain_loss", "forget_loss")
    events = read_events(runs / re.sub(r"\W+", "-", name) / "run.jsonl")
    return [{key: event[key] for key in keys} for event in events if event["event"] == "step"]


def tuning() -> list[tuple[Task, float]]:
    tasks = []
    for arm, keys in ARMS.items():
        for rate in RATES.get(arm, MASKED_RATES):
            given = [*keys, f"lr.generator={rate}", f"seed={TUNING_SEED}", f"steps={TUNING_STEPS}"]
            tasks.append(((arm, f"tune {arm} {rate:g}", given), rate))
    return tasks


def objective(last: dict[str, Any]) -> float:
    """Lower is better: FID doublings, plus what is missing of UA 99 % (five times) and of cover 90 %."""
    return math.log2(last["fid"]) + 5 * max(0.0, BAR - last["ua"]) + max(0.0, 0.9 - last["cover_rate"])


def best_rates(runs: Path) -> dict[str, float]:
    found: dict[str, tuple[float, float]] = {}
    for (arm, name, _), rate in tuning():
        value = objective(history(runs, name)[-1])
        found[arm] = min(found.get(arm, (math.inf, 0.0)), (value, rate))
    rates = {arm: rate for arm, (_, rate) in found.items()}
    return rates | {LORA: rates[LORA.removesuffix(", score lora")]}


def finals(rates: dict[str, float]) -> list[Task]:
    return [
        (arm, f"final {arm} seed {seed}", [*keys, f"lr.generator={rates[arm]}", f"seed={seed}", f"steps={STEPS}"])
        for arm, keys in ARMS.items()
        for seed in SEEDS
    ]


def run(runs: Path, jobs: int) -> None:
    for tasks in (lambda: [task for task, _ in tuning()], lambda: finals(best_rates(runs))):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda task: execute(task, runs), tasks()))


def collect(runs: Path) -> dict[str, Any]:
    rates = best_rates(runs)
    arms: dict[str, Any] = {}
    for arm, name, _ in finals(rates):
        if not finished(runs, name):
            print(f"left out, not finished: {name}")
            continue
        cost = json.loads((runs / re.sub(r"\W+", "-", name) / "metrics.json").read_text())["cost"]
        entry = arms.setdefault(arm, {"lr": rates[arm], "runs": []})
        run = {"history": history(runs, name), "losses": losses(runs, name)}
        entry["runs"].append({**run, "training_s": cost["training_s"], "memory": cost["memory"]})
    tuned = {name: history(runs, name)[-1] for (_, name, _), _ in tuning()}
    return {
        "command": "python bench/text_study.py run; python bench/text_study.py table",
        **environment(),
        "arms": arms,
        "tuning": tuned,
    }


def table(study: dict[str, Any]) -> str:
    heads = [
        "arm",
        "runs",
        "rate of θ",
        "iterations to UA ≥ 99 %",
        "at the end: UA %",
        "cover %",
        "retain, all words %",
        "FID",
        "worst FID",
    ]
    rows = []
    for arm, entry in study["arms"].items():
        ends = [run["history"][-1] for run in entry["runs"]]
        reached = [next((h["step"] for h in run["history"] if h["ua"] >= BAR), None) for run in entry["runs"]]
        hit = [float(step) for step in reached if step is not None]
        missing = f" [{len(hit)} of {len(reached)}]" if len(hit) < len(reached) else ""
        steps = f"{sum(hit) / len(hit):.0f} ({min(hit):.0f} … {max(hit):.0f}){missing}" if hit else "–"
        worst = [max(h["fid"] for h in run["history"]) for run in entry["runs"]]
        cells = [_mean([100 * e[key] for e in ends], 1) for key in ("ua", "cover_rate", "retain_accuracy")]
        rows.append(
            [
                arm,
                str(len(ends)),
                f"{entry['lr']:g}",
                steps,
                *cells,
                _mean([e["fid"] for e in ends], 2),
                _mean(worst, 1),
            ]
        )
    return markdown(heads, rows)


def picture(study: dict[str, Any]) -> None:
    """UA and FID of every arm, and the losses of a full score network beside those of an adapter; means over the seeds."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for (arm, entry), colour in zip(study["arms"].items(), COLOURS):
        steps = [h["step"] for h in entry["runs"][0]["history"]]
        for place, key in ((axes[0], "ua"), (axes[1], "fid")):
            rows = [[h[key] for h in run["history"]] for run in entry["runs"]]
            place.plot(steps, [sum(column) / len(column) for column in zip(*rows)], color=colour, label=arm, lw=1.6)
    for arm, style in ((LORA.removesuffix(", score lora"), "-"), (LORA, "--")):
        found = study["arms"][arm]["runs"]
        steps = [row["step"] for row in found[0]["losses"]]
        for key, colour in (("score_loss", COLOURS[0]), ("retain_loss", COLOURS[3]), ("forget_loss", COLOURS[1])):
            means = [
                sum(column) / len(column) for column in zip(*([row[key] for row in run["losses"]] for run in found))
            ]
            label = f"{key.replace('_', ' ')}, {'adapter' if arm == LORA else 'full ψ'}"
            axes[2].plot(steps, means, style, color=colour, label=label, lw=1.4)
    for place, title in zip(axes, ("UA", "retain FID", "losses: full ψ and adapter")):
        place.set_title(title, fontsize=10)
        place.set_xlabel("iterations")
        place.grid(alpha=0.25)
        place.legend(fontsize=6)
    axes[1].set_yscale("log")
    axes[2].set_yscale("symlog", linthresh=10)
    figure.savefig(PICTURE, dpi=110)


def _mean(values: list[float], digits: int) -> str:
    low, mean, high = bootstrap(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--runs", type=Path, default=Path("runs/text_study"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()
    if options.command == "run":
        run(options.runs, options.jobs)
        return 0
    study = collect(options.runs)
    RESULTS.write_text(json.dumps(study) + "\n")
    block = f"<!-- text:final -->\n{table(study)}\n<!-- /text:final -->"
    picture(study)
    text = DOC.read_text()
    DOC.write_text(re.sub(r"<!-- text:final -->.*?<!-- /text:final -->", lambda _: block, text, flags=re.DOTALL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
