"""The digits recipe, untouched, over all ten digits and three pairs with three seeds each.

    python bench/digits_table.py [--jobs 2] [--runs runs/table]

Every row is one `pecker-fast train digits ...`; finished runs are kept, so the command can be repeated or go on where it
was stopped. Writes bench/results/digits_table.json and the table docs/digits.md. Exits with 1 if a row of the recipe
misses its bar (UA, cover).
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pecker_fast.machine.hardware import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "digits_table.json"
TABLE = ROOT / "docs" / "digits.md"
BARS = {"ua": 0.98, "cover_rate": 0.93}
PAIRS = ((0, 1), (3, 8), (7, 1))
FIGURES = ("ua", "cover_rate", "retain_accuracy", "fid", "precision", "recall")

Row = tuple[str, list[str]]  # name of the run folder, overrides


def rows() -> dict[str, list[Row]]:
    """Overrides of every run, by section of the table."""

    def run(forget: int, cover: int, seed: int = 0) -> Row:
        return f"{forget}-{cover}-seed{seed}", [f"forget={forget}", f"cover={cover}", f"seed={seed}"]

    return {
        "Each digit": [run(d, dict(PAIRS).get(d, (d + 1) % 10)) for d in range(10)],
        "Three pairs, three seeds": [run(f, c, seed) for f, c in PAIRS for seed in range(3)],
    }


def execute(row: Row, runs: Path, threads: int) -> dict[str, object]:
    """Train one row (or find it finished) and return its figures."""
    name, keys = row
    keys = ["audit.budget=none", *keys, f"output={runs / name}"]
    command = [sys.executable, "-m", "pecker_fast", "train", "digits", *keys, "--quiet"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    metrics = json.loads((runs / name / "metrics.json").read_text())
    print(
        f"{name}: UA {metrics['after']['ua']:.4f}, cover {metrics['after']['cover_rate']:.4f}, FID {metrics['after']['fid']:.3f}",
        flush=True,
    )
    return {"name": name, "overrides": row[1], **{key: metrics[key] for key in ("before", "after", "teacher", "cost")}}


def table(sections: dict[str, list[dict]], head: str) -> str:
    """docs/digits.md."""
    lines = [head]
    for title, results in sections.items():
        names = ["run", "UA %", "cover %", "retain acc. %", "FID", "FID ÷ teacher's", "precision", "recall"]
        lines += [f"## {title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for r in results:
            after, teacher = r["after"], r["teacher"]
            lines.append(
                f"| {r['name']} | {100 * after['ua']:.2f} | {100 * after['cover_rate']:.2f} | {100 * after['retain_accuracy']:.2f} "
                f"| {after['fid']:.3f} | {after['fid'] / teacher['fid']:.2f} | {after['precision']:.3f} | {after['recall']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (1: all threads)")
    parser.add_argument("--runs", type=Path, default=Path("runs/table"), help="where the run folders go")
    options = parser.parse_args()
    plan = rows()
    unique = {row[0]: row for section in plan.values() for row in section}
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        done = {r["name"]: r for r in pool.map(lambda row: execute(row, options.runs, threads), unique.values())}
    sections = {title: [done[name] for name, _ in section] for title, section in plan.items()}
    machine = environment()
    command = f"python bench/digits_table.py --jobs {options.jobs}"
    RESULTS.write_text(
        json.dumps({"command": command, "threads_per_run": threads, **machine, "sections": sections}, indent=1) + "\n"
    )
    TABLE.write_text(table(sections, HEAD.format(command=command, threads=threads, device=machine["device"])))
    recipe = [r for section in sections.values() for r in section]
    missed = [r["name"] for r in recipe if any(r["after"][key] < bar for key, bar in BARS.items())]
    print(
        f"{len(recipe) - len(missed)} of {len(recipe)} rows reach UA ≥ 98 % and cover ≥ 93 %"
        + (f"; missed: {missed}" if missed else "")
    )
    print(f"table: {TABLE}")
    return 1 if missed else 0


HEAD = """# The digits, all of them

The shipped recipe `digits`, untouched but for the words: which digit to forget, what to draw instead, the seed. Figures of
`metrics.json` (2,000 forget samples, 2,000 retain samples; FID, precision and recall over the judge's features against the
real digits without the forgotten class). Controls, each with rates of its own: [evidence.md](evidence.md).
"FID ÷ teacher's": against the teacher's own 50-step DDIM samples, 2,000 too.

Made by `{command}` ({device}, {threads} thread a run, several at a time).

"""

if __name__ == "__main__":
    sys.exit(main())
