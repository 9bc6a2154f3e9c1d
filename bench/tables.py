"""Markdown tables of the benchmark results, for docs/performance.md.

    python bench/tables.py                              # print them
    python bench/tables.py --write docs/performance.md  # replace what stands between the markers there

The markers of a suite are <!-- bench:SUITE --> and <!-- /bench:SUITE -->; a suite without markers or results is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SUITES = ("adam", "adam_slow_memory", "threshold", "saliency", "bits")
PARTS_COMMAND = "python bench/parts.py --label NAME"
SHORTEST_SHARE = 0.0005


def name_of(entry: dict[str, Any]) -> str:
    """The test's own words for the case: test_step[masked-cifar10-row-0.1] -> masked-cifar10-row-0.1."""
    return re.sub(r"^test_\w+\[(.*)\]$", r"\1", entry["name"])


def milliseconds(times: dict[str, float]) -> str:
    """p50 (p20–p80)."""
    return f"{times['p50_ms']:.3g} ({times['p20_ms']:.3g}–{times['p80_ms']:.3g})"


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.1%}" if share >= SHORTEST_SHARE else f"< {SHORTEST_SHARE:.2%}"


def row(entry: dict[str, Any]) -> str:
    info = entry["extra_info"]
    peers = "; ".join(
        f"{name} {milliseconds(times)}: **{info['ratios'][name]:.2f} ×**" for name, times in info["peers"].items()
    )
    cells = [
        f"`{name_of(entry)}`",
        milliseconds(info["ours"]),
        peers or "–",
        f"{info['bytes'] / 1e6:,.0f}",
        f"{info['bytes_per_s'] / 1e9:.1f}",
        f"{percent(info['share_of_copy_bandwidth'])} / {percent(info['share_of_update_bandwidth'])}",
        percent(info["share_of_iteration_at_most"]),
    ]
    return "| " + " | ".join(cells) + " |"


def table(result: dict[str, Any]) -> str:
    """The table of one result file, headed by machine and command."""
    machine = result["machine_info"]
    entries = [entry for entry in result["benchmarks"] if "ours" in entry["extra_info"]]
    heads = ["case", "ours, ms: p50 (p20–p80)", "peers, ms: time ÷ ours", "MB at least", "GB/s"]
    heads += ["share of copy / in-place update bandwidth", "share of an iteration, at most"]
    impls = sorted({entry["extra_info"]["impl"] for entry in entries if "impl" in entry["extra_info"]})
    about = f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    about += f", impl {', '.join(impls)}" if impls else ""
    about += f", {result['scale']} scale" if result["scale"] != "full" else ""
    return "\n".join(
        [
            f"{about}; `{result['command']}`.",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            *map(row, entries),
        ]
    )


def parts_table(result: dict[str, Any]) -> str:
    """bench/parts.py's columns beside each other, the ratio of the first to the last at the end."""
    machine, networks = result["machine"], result["networks"]
    labels = list(next(iter(networks.values()))["parts_ms"])
    heads = [f"{name}: {label}" for name in networks for label in (*labels, "ratio")]
    rows = []
    for part in next(iter(networks.values()))["parts_ms"][labels[0]]:
        cells = []
        for network in networks.values():
            times = [network["parts_ms"][label][part] for label in labels]
            cells += [
                *(f"{ms:,.3g}" if ms < 1000 else f"{ms:,.0f}" for ms in times),
                f"**{times[0] / times[-1]:.1f} ×**",
            ]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    sizes = ", ".join(f"{name} {network['weights'] / 1e6:,.1f} M weights" for name, network in networks.items())
    about = f"ms, {machine['threads']} threads, torch {machine['torch']}; {sizes}; `{PARTS_COMMAND}`."
    return "\n".join([about, "", f"| part | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *rows])


def iteration_table(result: dict[str, Any]) -> str:
    """bench/test_bench_iteration.py: medians, each against the plain loop of the same rule and against upstream's habits."""
    times = {entry["name"]: entry["stats"] for entry in result["benchmarks"]}
    rows = []
    for name, stats in times.items():
        kind, _, what = name.removeprefix("test_").removesuffix("]").partition("[")
        rule = what.rpartition("-")[2]
        variant = what.rpartition("-")[0]
        label = ", ".join(filter(None, ("engine", variant))) if kind.startswith("engine") else variant
        cells = [label, f"`{rule}`", f"{1e3 * stats['median']:.1f}"]
        for peer in ("plain", "upstream"):
            other = times.get(f"test_baseline[{peer}-{rule}]")
            cells.append("–" if other is None else f"{other['median'] / stats['median']:.2f} ×")
        rows.append(f"| {' | '.join(cells)} |")
    heads = ["loop", "rule", "ms, median", "the plain loop takes", "upstream's habits take"]
    about = _about(result["machine_info"], result["command"])
    return "\n".join([about, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows])


def account_table(result: dict[str, Any]) -> str:
    """`pecker-fast bench --json`: one iteration by part, dense beside masked."""
    from pecker_fast.report.cost import cells, facts, heads, known, lines

    variants = result["variants"]
    rows = lines(variants)
    columns = known(rows)
    names = ["part", *heads(list(variants), columns)]
    recipe = result["recipe"]
    what = (
        f"rule `{recipe['update_rule']}`, {recipe['mask']['structure']} mask of density {recipe['mask']['density']:g}"
    )
    about = _about(
        result["machine"], f"pecker-fast bench {recipe['model']} --iterations {result['iterations']} --json …"
    )
    return "\n".join(
        [
            f"{about[:-1]}; {what}, batch {recipe['batch_size']}, {result['weights']:,} weights.",
            "",
            f"| {' | '.join(names)} |",
            "|---" * len(names) + "|",
            *(f"| {line.name} | {' | '.join(cells(line, columns))} |" for line in rows),
            "",
            f"| | {' | '.join(variants)} |",
            "|---" * (1 + len(variants)) + "|",
            *(f"| {' | '.join(row)} |" for row in facts(variants)),
        ]
    )


def floor_table(result: dict[str, Any]) -> str:
    """bench/floor.py: the bounds of an iteration, then every convolution by its share of the work."""
    peaks, iteration = result["peaks"], result["iteration"]
    sgemm = peaks["sgemm_flops_per_s"]
    bounds = [
        ("its products at the speed of a large one", iteration["products_ms"]),
        ("memory that optimizers, checks and average must move", iteration["memory_ms"]),
        ("every convolution alone, as often as it runs", iteration["layers_ms"]),
        *iteration["measured_ms"].items(),
    ]
    lines = [
        _about(result["machine"], result["command"])[:-1] + f"; {sgemm / 1e9:.1f} GFLOP/s in a large matrix product, "
        f"{peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s in a copy; {iteration['flops'] / 1e9:.2f} GFLOP an iteration, "
        f"{iteration['flops_in_convolutions'] / iteration['flops']:.0%} of them in convolutions.",
        "",
        "| one iteration | ms | of the engine's time |",
        "|---|---|---|",
        *(f"| {name} | {ms:.1f} | {ms / iteration['measured_ms']['engine']:.0%} |" for name, ms in bounds),
        "",
        "| convolution | layers | forward, GFLOP/s | to its input | to its weights |",
        "|---|---|---|---|---|",
    ]
    for layer in result["convolutions"]:
        rates = [layer["times"][way]["flops_per_s"] for way in ("forward", "input", "weight")]
        cells = [f"{rate / 1e9:.1f} ({rate / sgemm:.0%})" for rate in rates]
        lines.append(f"| {layer['shape']} | {layer['layers']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _about(machine: dict[str, Any], command: str) -> str:
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}; `{command}`."


OTHERS = {
    "parts": ("parts.json", parts_table),
    "iteration": ("iteration.json", iteration_table),
    "account": ("account_digits.json", account_table),
    "floor": ("floor_digits.json", floor_table),
}


def load(results: Path = RESULTS) -> dict[str, str]:
    """{suite: table} of the result files that are there."""
    found = {suite: results / f"{suite}.json" for suite in SUITES}
    tables = {suite: table(json.loads(path.read_text())) for suite, path in found.items() if path.is_file()}
    others = {suite: (results / name, make) for suite, (name, make) in OTHERS.items()}
    return tables | {s: make(json.loads(path.read_text())) for s, (path, make) in others.items() if path.is_file()}


def replaced(text: str, tables: dict[str, str]) -> str:
    """`text` with each suite's table between its markers."""
    for suite, lines in tables.items():
        block = f"<!-- bench:{suite} -->\n{lines}\n<!-- /bench:{suite} -->"
        text = re.sub(rf"<!-- bench:{suite} -->.*?<!-- /bench:{suite} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the Markdown file whose tables are replaced")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    tables = load(options.results)
    if options.write is None:
        for suite, lines in tables.items():
            print(f"## {suite}\n\n{lines}\n")
        return 0
    options.write.write_text(replaced(options.write.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
