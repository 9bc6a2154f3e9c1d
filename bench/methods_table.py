"""Every method beside the others: digits 0 → 1, 3 → 8, 7 → 1 with three seeds, shapes circle → square, red → blue, cross → triangle
with two.

    python bench/methods_table.py [--worlds digits,shapes] [--jobs 2] [--runs runs/methods]

One `pecker-fast compare` for each pair of words: each method by its own shipped recipe (digits_salun, shapes_spare, …), untouched
but for the words and the seed. Finished runs are kept, so the command goes on where it was stopped. Writes
bench/results/methods_WORLD.json and the tables in docs/methods.md. Audits are bench/audit_study.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast.machine.hardware import environment
from pecker_fast.report.compare import KINDS, NONE, cell
from pecker_fast.runs import COMPARED

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOC = ROOT / "docs" / "methods.md"
SHOWN = (
    "ua", "cover_rate", "retain_accuracy", "neighbour_loss", "fid_ratio", "precision", "recall", "training_s", "images", "flops",
    "peak_memory_bytes", "moved",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """pairs: {title: keys of the words}. seeds: of each method. never: pairs that have a model that never knew."""

    recipe: str
    methods: str
    seeds: int
    pairs: dict[str, list[str]]
    never: dict[str, str]
    keys: tuple[str, ...]


WORLDS = {
    "digits": World(
        "digits",
        "pecker,sfd,spare,salun,esd,sa,relabel",
        3,
        {f"{f} → {c}": [f"forget={f}", f"cover={c}"] for f, c in ((0, 1), (3, 8), (7, 1))},
        {"0 → 1": "digits_without_0"},
        ("evaluate.every=0", "evaluate.final=1000", "evaluate.teacher_steps=20", "audit.budget=none"),
    ),
    "shapes": World(
        "shapes",
        "pecker,spare,salun,esd,sa,uce,sld",
        2,
        {
            f"{f} → {c}": [f"forget.concept={f}", f"cover={c}"]
            for f, c in (("circle", "square"), ("red", "blue"), ("cross", "triangle"))
        },
        {"circle → square": "shapes_without_circle"},
        ("evaluate.every=0", "evaluate.final=400", "evaluate.teacher_steps=25", "audit.budget=none"),
    ),
}


def command(world: World, pair: str, runs: str | Path) -> list[str]:
    """Arguments of the comparison of one pair."""
    never = ["--never", world.never[pair]] if pair in world.never else []
    keys = [*world.pairs[pair], *world.keys]
    return [
        "compare",
        world.recipe,
        "--methods",
        world.methods,
        "--seeds",
        str(world.seeds),
        *never,
        "-o",
        str(runs),
        *keys,
    ]


def compared(world: World, pair: str, runs: Path, threads: int) -> dict[str, Any]:
    """What compare.json of one pair holds, without the place of its runs."""
    folder = runs / re.sub(r"\W+", "-", f"{world.recipe} {pair}")
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [sys.executable, "-m", "pecker_fast", *command(world, pair, folder), "--quiet"], check=True, env=environ
    )
    found = json.loads((folder / "compare.json").read_text())
    for run in found["runs"]:
        run["run"] = Path(run["run"]).name
    print(f"{pair}: compared", flush=True)
    return found


def worst_and_mean(pairs: dict[str, dict[str, Any]], method: str, key: str) -> dict[str, float] | None:
    """Over pairs and seeds alike."""
    runs = [run for found in pairs.values() for run in found["runs"]]
    values = [run[key] for run in runs if run["method"] == method and run[key] is not None]
    if not values:
        return None
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def table(pairs: dict[str, dict[str, Any]]) -> str:
    """A row for each method over all pairs, then one for each pair."""
    columns = [column for column in COMPARED if column.key in SHOWN]
    rows = {row["method"]: row for found in pairs.values() for row in found["rows"]}
    head = ["method", "draws in", *(f"{column.name} {column.better}".strip() for column in columns)]
    lines = [head, ["---"] * len(head)]
    for method, row in rows.items():
        figures = (cell(worst_and_mean(pairs, method, column.key), column.form) for column in columns)
        lines.append([method, KINDS[row["result"]], *figures])
    short = [
        column
        for column in columns
        if column.key in ("ua", "cover_rate", "retain_accuracy", "neighbour_loss", "fid_ratio")
    ]
    names = list(pairs)
    head = ["method", *(f"{column.name}: {', '.join(names)}" for column in short)]
    each = [head, ["---"] * len(head)]
    for method in rows:
        found = [{row["method"]: row for row in pairs[name]["rows"]}.get(method) for name in names]
        each.append(
            [
                method,
                *(
                    " · ".join(NONE if row is None else cell(row[c.key], c.form).split(" (")[0] for row in found)
                    for c in short
                ),
            ]
        )
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in block) for block in (lines, each))


def write(name: str, pairs: dict[str, dict[str, Any]]) -> None:
    block = f"<!-- methods:{name} -->\n{table(pairs)}\n<!-- /methods:{name} -->"
    pattern = rf"<!-- methods:{name} -->.*?<!-- /methods:{name} -->"
    DOC.write_text(re.sub(pattern, lambda _: block, DOC.read_text(), flags=re.DOTALL))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="digits,shapes", help="which, with a comma between")
    parser.add_argument("--jobs", type=int, default=2, help="pairs at a time, one thread each (1: all threads)")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the run folders go")
    parser.add_argument("--table", action="store_true", help="write the tables again from bench/results")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    for name in options.worlds.split(","):
        world, results = WORLDS[name], RESULTS / f"methods_{name}.json"
        if not options.table:
            with ThreadPoolExecutor(options.jobs) as pool:
                found = list(pool.map(lambda pair: compared(world, pair, options.runs, threads), world.pairs))  # noqa: B023
            head = {
                "command": f"python bench/methods_table.py --worlds {name} --jobs {options.jobs}",
                "threads": threads,
            }
            data = {**head, **environment(), "pairs": dict(zip(world.pairs, found))}
            results.write_text(json.dumps(data, indent=1) + "\n")
        write(name, json.loads(results.read_text())["pairs"])
        print(f"table: {DOC}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
