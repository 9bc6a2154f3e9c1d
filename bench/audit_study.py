"""Hidden or forgotten, arm by arm: what comes back from each way of forgetting, against models that never knew.

    python bench/audit_study.py --never digits_without_0 [--never MODEL] [--pairs 0-1] [--seeds 0] [--budget standard] [--jobs 2]
    python bench/audit_study.py --world shapes --never shapes_without_circle --pairs circle-square

Every arm is one `pecker-fast train ...` and one `pecker-fast audit` of it; what is finished is kept, so the command goes
on where it was stopped. Its rows join those of bench/results/audit_study.json, and the tables between the marks of
docs/evidence.md are written anew. A pair whose forgotten class no `--never` was made without has no floor: its rows
say so.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pecker_fast.audit import PROBES
from pecker_fast.machine.hardware import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "audit_study.json"
PAGE = ROOT / "docs" / "evidence.md"
PLAIN = "audit.budget=none"
ATTACKED = [
    "adversary.conditions=12",
    "adversary.steps=2",
    "adversary.starts=[forget,kept,random]",
    "adversary.half_way=0.4",
]
Pair = tuple[str, str]
DIGITS: dict[str, tuple[str, list[str]]] = {
    "SFD": ("digits_sfd", []),
    "PECKER, the paper's rule": ("digits_plain", ["update_rule=differentiated", "lr.generator=4e-5", "steps=550"]),
    "ours, no adversary": ("digits_plain", []),
    "ours, no adversary, the rates of ours": ("digits", ["adversary.conditions=0", PLAIN]),
    "ours": ("digits", [PLAIN]),
    "ours, nothing half-way": ("digits", [PLAIN, "adversary.half_way=0"]),
    "ours, embedding in the mask": ("digits", [PLAIN, "mask.exclude=[]"]),
    "adversary, dense": ("digits_sfd", [*ATTACKED, "steps=400"]),
}
SHAPES = {
    "ours, no adversary": ("shapes_plain", [PLAIN]),
    "ours": ("shapes", [PLAIN]),
}
WORLDS = {"digits": DIGITS, "shapes": SHAPES}
FIGURES = ("ua", "cover_rate", "retain_accuracy", "fid")


def execute(arm: str, pair: Pair, seed: int, options: argparse.Namespace, threads: int) -> dict:
    """Train and audit one arm (or find it done) and return its figures."""
    recipe, keys = WORLDS[options.world][arm]
    forget, cover = pair
    folder = options.runs / f"{arm.replace(' ', '_').replace(',', '').replace(chr(39), '')}-{forget}-{cover}-{seed}"
    command = [sys.executable, "-m", "pecker_fast"]
    concept = "forget.concept" if options.world == "shapes" else "forget"
    words = [f"{concept}={forget}", f"cover={cover}", f"seed={seed}", f"output={folder}", "evaluate.every=0", *keys]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "train", recipe, *words, "--quiet"], check=True, env=environ)
    against = [word for name in fitting(options.never, forget) for word in ("--against", name)]
    audit = [*command, "audit", str(folder), "--budget", options.budget, *against, "--quiet"]
    first = options.controls.setdefault(pair, folder)  # the controls of a pair are the same for all its arms
    audit += ["--controls-of", str(first)] if first != folder else []
    subprocess.run(audit, check=True, env=environ)
    metrics, record = (json.loads((folder / name).read_text()) for name in ("metrics.json", "audit.json"))
    row = {"world": options.world, "arm": arm, "pair": f"{forget} → {cover}", "seed": seed}
    row |= {"training_s": metrics["cost"]["training_s"], "threads": threads}
    row |= {key: metrics["after"].get(key) for key in FIGURES} | {"teacher_fid": metrics["teacher"]["fid"]}
    print(f"{arm} {forget} → {cover}, seed {seed}: {record['verdict']}", flush=True)
    return row | {"audit": record}


def fitting(names: list[str], forget: str) -> list[str]:
    """The models that never knew this class or word."""
    cards = {name: json.loads((Path(name) / "model.json").read_text()) for name in names}
    return [name for name, card in cards.items() if forget in map(str, card.get("without", []))]


def cell(found: dict, probe: str, role: str) -> str:
    one = found["probes"].get(probe, {}).get("figures", {}).get(role)
    return "–" if one is None or one["recovery"] is None else f"{100 * one['recovery']:.1f}"


def table(rows: list[dict]) -> str:
    """A line for each arm, and for the controls of each pair."""
    names = [
        "arm",
        "pair",
        "seed",
        "UA",
        "cover",
        "kept",
        "FID ÷ teacher's",
        *PROBES,
        "half back after (condition / relearn)",
        "s",
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        found = row["audit"]
        figures = ["–" if row[key] is None else f"{100 * row[key]:.1f}" for key in FIGURES[:3]]
        figures.append(f"{row['fid'] / row['teacher_fid']:.2f}")
        probes = [f"{cell(found, probe, 'result')} {MARK[found['probes'][probe]['verdict']]}" for probe in PROBES]
        half = " / ".join(_half(found, probe, "result") for probe in ("condition", "relearn"))
        cells = [row["arm"], row["pair"], str(row["seed"]), *figures, *probes, half, f"{row['training_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for pair in dict.fromkeys(row["pair"] for row in rows):
        found = next(row["audit"] for row in rows if row["pair"] == pair)
        for role in [role for role in found["identity"]["subjects"] if role != "result"]:
            half = " / ".join(_half(found, probe, role) for probe in ("condition", "relearn"))
            probes = [cell(found, probe, role) for probe in PROBES]
            lines.append(f"| {' | '.join([f'*{role}*', pair, '', '', '', '', '', *probes, half, ''])} |")
    return "\n".join(lines)


MARK = {
    "holds": "✓",
    "as if never known": "=",
    "hides": "✗",
    "cannot tell": "?",
    "kept": "",
    "lost": "(lost)",
    None: "",
}


def _half(found: dict, probe: str, role: str) -> str:
    one = found["probes"].get(probe, {}).get("figures", {}).get(role, {})
    return "–" if one.get("to_half") is None else str(one["to_half"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--never", action="append", default=[], help="folder of a model that never knew, may be given again"
    )
    parser.add_argument("--world", choices=WORLDS, default="digits")
    parser.add_argument("--pairs", default="", help="forget-cover, as 0-1,3-8 or circle-square; default: the recipe's")
    parser.add_argument("--seeds", default="0", help="as 0,1,2")
    parser.add_argument("--arms", default="", help="some of the arms, by their numbers, as 0,2,4; default: all")
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time, one thread each (1: all threads)")
    parser.add_argument(
        "--controls", type=Path, help="finished arm of the first pair whose audit's controls are taken over"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/audit-study"), help="where the run folders go")
    options = parser.parse_args()
    options.never = [
        name if Path(name).is_dir() else str(ROOT / "pecker_fast" / "assets" / name) for name in options.never
    ]
    named = options.pairs or {"digits": "0-1", "shapes": "circle-square"}[options.world]
    pairs = [tuple(pair.split("-")) for pair in named.split(",")]
    of_world = list(WORLDS[options.world])
    arms = [of_world[int(n)] for n in options.arms.split(",")] if options.arms else of_world
    plan = [(arm, pair, int(seed)) for pair in pairs for seed in options.seeds.split(",") for arm in arms]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    options.controls = {pairs[0]: options.controls} if options.controls else {}
    firsts = [next(one for one in plan if one[1] == pair) for pair in pairs]
    rows = {one: execute(*one, options, threads) for one in firsts}
    rest = [one for one in plan if one not in rows]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows |= dict(zip(rest, pool.map(lambda one: execute(*one, options, threads), rest)))
    command = f"python bench/audit_study.py {' '.join(sys.argv[1:])}"
    write([{**rows[one], "command": command, **environment()} for one in plan])
    return 0


def write(new: list[dict]) -> None:
    """The rows join those on file, in the order of worlds, pairs, arms and seeds, and the tables are made anew."""
    names = ("world", "pair", "arm", "seed")
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = {tuple(row[name] for name in names): row for row in [*old, *new]}
    pairs = list(dict.fromkeys(key[:2] for key in rows))
    order = {arm: n for arms in WORLDS.values() for n, arm in enumerate(arms)}
    found = sorted(
        rows.values(), key=lambda row: (pairs.index((row["world"], row["pair"])), order[row["arm"]], row["seed"])
    )
    RESULTS.write_text(json.dumps({"rows": found}, indent=1) + "\n")
    page = PAGE.read_text()
    for world in WORLDS:
        start, end = f"<!-- audit:{world} -->", f"<!-- /audit:{world} -->"
        own = [row for row in found if row["world"] == world]
        if start in page and own:
            before, rest = page.split(start)
            page = f"{before}{start}\n{table(own)}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(page)


if __name__ == "__main__":
    sys.exit(main())
