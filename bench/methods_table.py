"""The methods beside each other: digits and shapes, three pairs each, several seeds, every method by its own recipe.

    python bench/methods_table.py digits [--seeds 3] [--methods spare,salun] [--jobs 2] [--runs runs/methods]
    python bench/methods_table.py shapes

Every pair is one `pecker-fast compare`; finished runs are kept, so the command can be repeated, go on where it was stopped, or add
methods and seeds. Writes bench/results/methods_WORLD.json and the tables in docs/methods.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pecker_fast.machine.hardware import environment
from pecker_fast.report.compare import markdown
from pecker_fast.runs import COMPARED
from pecker_fast.runs.comparing import rows_of

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "methods.md"
EVERY = ("audit.budget=none", "evaluate.every=0")
WORLDS: dict[str, dict[str, Any]] = {
    "digits": {
        "methods": "pecker,spare,salun,esd,sa,relabel",
        "pairs": {f"{f} → {c}": [f"forget={f}", f"cover={c}"] for f, c in ((0, 1), (3, 8), (7, 1))},
        "keys": ["evaluate.teacher_steps=20", "evaluate.final=1000"],
        "never": {"0 → 1": "digits_without_0"},
        "seeds": 3,
    },
    "shapes": {
        "methods": "pecker,spare,salun,esd,uce,sld",
        "pairs": {
            f"{f} → {c}": [f"forget.concept={f}", f"cover={c}"]
            for f, c in (("circle", "square"), ("red", "blue"), ("cross", "triangle"))
        },
        "keys": ["evaluate.final=600"],
        "never": {"circle → square": "shapes_without_circle"},
        "seeds": 2,
    },
}
KEPT = (*(column.key for column in COMPARED), "method", "seed")  # of a run


def compared(world: str, pair: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of one pair."""
    told = WORLDS[world]
    folder = options.runs / world / re.sub(r"\W+", "-", pair)
    command = [sys.executable, "-m", "pecker_fast", "compare", world, *told["pairs"][pair], *told["keys"], *EVERY]
    command += ["--methods", options.methods or told["methods"], "--seeds", str(options.seeds or told["seeds"])]
    command += ["--output", str(folder), "--quiet"]
    if pair in told["never"]:
        command += ["--never", told["never"][pair]]
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    runs = json.loads((folder / "compare.json").read_text())["runs"]
    return [{key: run[key] for key in KEPT} for run in runs]


def write_tables(world: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """docs/methods.md, between its marks."""
    parts = [f"**{world}, {pair}**\n\n{markdown(rows_of(runs), COMPARED)}" for pair, runs in found.items()]
    block = f"<!-- {world}:methods -->\n" + "\n".join(parts) + f"<!-- /{world}:methods -->"
    pattern = rf"<!-- {world}:methods -->.*?<!-- /{world}:methods -->"
    DOC.write_text(re.sub(pattern, lambda _: block, DOC.read_text(), flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=list(WORLDS))
    parser.add_argument("--methods", help="names with commas between; default: all")
    parser.add_argument("--seeds", type=int, help="of each method and pair")
    parser.add_argument("--jobs", type=int, default=2, help="pairs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the run folders go")
    parser.add_argument("--table", action="store_true", help="write the tables again from the results")
    options = parser.parse_args()
    results = ROOT / "bench" / "results" / f"methods_{options.world}.json"
    if not options.table:
        pairs = WORLDS[options.world]["pairs"]
        with ThreadPoolExecutor(options.jobs) as pool:
            found = dict(zip(pairs, pool.map(lambda pair: compared(options.world, pair, options), pairs)))
        command = " ".join(["python bench/methods_table.py", options.world, f"--jobs {options.jobs}"])
        results.write_text(json.dumps({"command": command, **environment(), "pairs": found}, indent=1) + "\n")
    write_tables(options.world, json.loads(results.read_text())["pairs"])


if __name__ == "__main__":
    main()
