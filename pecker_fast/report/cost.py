"""The parts of an iteration as rows: dense beside masked, for the console, the page and the notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pecker_fast.report.text import NONE, number, scaled, section

if TYPE_CHECKING:
    from rich.table import Table

NOTE = (
    "1 score step, 2 generator step; φ + ψ are passed back to x_t alone. GFLOP of convolutions and matrix products; optimizer, "
    "finite checks and average by formula, every operation. MB moved: all operands, an upper bound (caches and fused loops "
    "move less); by formula, at least. MB alive: the most bytes of tensors at once. The mask is spread over its iterations."
)
BACKWARD = "generator_backward"
WEIGHTS = "weight_gradients"
PARTS = {
    "draws": "draws",
    "adversary": "the adversary's steps",
    "score_samples": "1 θ forward",
    "score_forward": "1 ψ forward",
    "score_backward": "1 ψ backward",
    "score_optimizer": "1 ψ optimizer",
    "generator_forward": "2 θ forward",
    "guide_forward": "2 φ + ψ forward",
    "guide_backward": "2 φ + ψ backward",
    BACKWARD: "2 θ backward",
    f"{BACKWARD}_retain": "· retain",
    f"{BACKWARD}_forget": "· forget",
    WEIGHTS: "· weight gradients",
    "generator_optimizer": "2 θ optimizer",
    "finite_check": "finite checks",
    "ema": "average of θ",
    "other": "all else",
    "mask": "making the mask",
}
# key, head, unit, whether parts add up to the iteration (the others have a greatest, or none)
COLUMNS = (
    ("flops", "GFLOP", 1e9, True),
    ("bytes", "MB moved", 1e6, True),
    ("ms", "ms", 1.0, True),
    ("share", "share", 0.01, False),
    ("peak_tensor_bytes", "MB alive", 1e6, False),
    ("energy_j", "J", 1.0, True),
)
WORK, WALL = ("flops", "bytes"), ("ms", "share", "peak_tensor_bytes", "energy_j")
Variant = Mapping[str, Any]  # an account (pecker_fast.account) of one kind of iteration


class Line(NamedTuple):
    """One part: values[column][variant], None where unknown. `within`: already contained in the row above."""

    name: str
    values: dict[str, list[float | None]]
    within: bool


def lines(variants: Mapping[str, Variant]) -> list[Line]:
    """A row a part, those no variant has left out, and their sum at the end."""
    tables = [_parts(variant) for variant in variants.values()]
    rows = []
    for key, name in PARTS.items():
        if any(key in table for table in tables):
            values = {column: [number(table.get(key, {}).get(column)) for table in tables] for column, *_ in COLUMNS}
            rows.append(Line(name, values, name.startswith("·")))
    sums: dict[str, list[float | None]] = {column: [] for column, *_ in COLUMNS}
    for i in range(len(tables)):
        for column, _, _, adds in COLUMNS:
            known = [x for row in rows if not row.within and (x := row.values[column][i]) is not None]
            add = sum if adds else max
            sums[column].append(add(known) if known and column != "share" else None)
    return [*rows, Line("one iteration", sums, False)]


def _parts(variant: Variant) -> dict[str, dict[str, Any]]:
    """Parts by name with θ's backward passes added up, the mask and the weight gradients among them."""
    parts = {key: dict(part) for key, part in section(variant, "parts").items() if isinstance(part, Mapping)}
    passes = [key for key in parts if key.startswith(BACKWARD)]
    if passes:
        added: dict[str, Any] = {}
        for column, _, _, adds in COLUMNS:
            known = [x for key in passes if (x := number(parts[key].get(column))) is not None]
            if known:
                added[column] = (sum if adds else max)(known)
        for key in passes:
            if key not in PARTS or len(passes) == 1:
                del parts[key]
        parts[BACKWARD] = added
    weights = section(variant, BACKWARD)
    if number(weights.get("weight_gradient_flops")) is not None:
        parts[WEIGHTS] = {"flops": weights["weight_gradient_flops"]}
    if section(variant, "mask"):
        parts["mask"] = section(variant, "mask")
    whole = sum(number(part.get("ms")) or 0.0 for key, part in parts.items() if key not in (WEIGHTS, *_within(parts)))
    for part in parts.values():
        if number(part.get("ms")) is not None and whole:
            part["share"] = part["ms"] / whole
    return parts


def _within(parts: Mapping[str, Any]) -> list[str]:
    return [key for key in parts if PARTS.get(key, "").startswith("·")]


def cell(value: float | None, unit: float) -> str:
    """Three digits of `value` in units of `unit`."""
    if value is None:
        return NONE
    x = value / unit
    return "0" if x == 0 else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def known(rows: Sequence[Line], columns: Sequence[str] = WORK + WALL) -> list[str]:
    """Those of `columns` in which some row has a value."""
    return [column for column in columns if any(x is not None for row in rows for x in row.values[column])]


def cells(line: Line, columns: Sequence[str]) -> list[str]:
    """What stands in a row, by column: every variant; for what adds up also the ratio of the first of two to the second."""
    row = []
    for column, _, unit, adds in COLUMNS:
        if column not in columns:
            continue
        values = line.values[column]
        row += [NONE if x is None else f"{100 * x:.1f} %" if column == "share" else cell(x, unit) for x in values]
        if adds and len(values) == 2:
            first, second = values
            row.append(NONE if first is None or not second else f"{first / second:.2f} ×")
    return row


def heads(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The heads of `cells`."""
    out = []
    for column, title, _, adds in COLUMNS:
        if column in columns:
            out += [f"{title}, {name}" for name in names] + (["ratio"] if adds and len(names) == 2 else [])
    return out


def facts(variants: Mapping[str, Variant]) -> list[list[str]]:
    """What is not of one part: (name, a value for each variant)."""
    backward = {
        "θ backward: to its input": "input_flops",
        "θ backward: weight gradients done": "weight_gradient_flops",
        "θ backward: weight gradients the rule reads": "live_weight_gradient_flops",
    }
    rows = [
        ["iteration, ms: p50 (p20–p80)", *(_spread(v.get("iteration_ms")) for v in variants.values())],
        ["peak of live tensors", *(scaled(v.get("peak_tensor_bytes"), "B") for v in variants.values())],
        ["peak of the GPU's allocator", *(scaled(v.get("peak_allocated_bytes"), "B") for v in variants.values())],
        ["optimizer state of θ", *(scaled(_state(v, "generator"), "B") for v in variants.values())],
        ["optimizer state of ψ", *(scaled(_state(v, "score"), "B") for v in variants.values())],
        ["gradients handed to one step", *(scaled(v.get("gradient_bytes"), "B") for v in variants.values())],
        *([name, *(_of_backward(v, key) for v in variants.values())] for name, key in backward.items()),
        ["energy of an iteration", *(scaled(v.get("energy_j"), "J") for v in variants.values())],
    ]  # fmt: skip
    return [row for row in rows if any(value != NONE for value in row[1:])]


def _spread(value: Any) -> str:
    if isinstance(value, Mapping):
        p20, p50, p80 = (number(value.get(key)) for key in ("p20", "p50", "p80"))
        return NONE if p20 is None or p50 is None or p80 is None else f"{p50:.4g} ({p20:.4g}–{p80:.4g})"
    return NONE if number(value) is None else f"{value:.4g}"


def _state(variant: Variant, network: str) -> Any:
    return section(variant, "optimizer_state_bytes").get(network)


def _of_backward(variant: Variant, key: str) -> str:
    return scaled(section(variant, BACKWARD).get(key), "FLOP")


def parts_tables(variants: Mapping[str, Variant]) -> list[Table]:
    """The rows as two rich tables, what is done and what it takes, and the facts as a third."""
    from rich.table import Table

    names, rows, tables = list(variants), lines(variants), []
    for columns in (known(rows, WORK), known(rows, WALL)):
        if not columns:
            continue
        table = Table("part", *heads(names, columns))
        for column in table.columns[1:]:
            column.justify = "right"
        for line in rows:
            table.add_row(line.name, *cells(line, columns), style="dim" if line.within else None)
        tables.append(table)
    below = Table("", *names, caption=NOTE, caption_justify="left")
    for row in facts(variants):
        below.add_row(*row)
    return [*tables, below]


def of_run(account: Mapping[str, Any]) -> dict[str, Variant]:
    """A run's own account beside its dense counterpart, as far as that is known without running it: no times."""
    dense = section(account, "dense")
    if not dense or not account.get("masked"):
        return {"this run": account}
    parts = {
        key: {column: part[column] for column in ("flops", "bytes") if column in part}
        for key, part in section(account, "parts").items()
        if not key.startswith(BACKWARD)
    }
    backward = section(account, BACKWARD)
    counterpart = {
        "parts": parts | {key: value for key, value in dense.items() if isinstance(value, Mapping)},
        BACKWARD: {**backward, "weight_gradient_flops": backward.get("dense_weight_gradient_flops"),
                   "live_weight_gradient_flops": backward.get("dense_weight_gradient_flops")},
    }  # fmt: skip
    return {"dense": counterpart, "this run": account}
