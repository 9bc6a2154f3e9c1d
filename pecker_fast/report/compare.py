"""The comparison of methods as a table: for a terminal, Markdown, and one page with image grids at equal noise."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pecker_fast import files

NONE = "–"
KINDS = {
    "one-step": "one step",
    "denoiser": "many steps",
    "edit": "many steps",
    "sampling": "many steps, steered",
    "never": "many steps",
}


def cell(value: Any, form: str) -> str:
    """A figure in words: the mean over seeds, with the least and the most where there are several."""
    if value is None:
        return NONE
    if form == "text":
        return str(value)
    text = _figure(value["mean"], form)
    low, high = (_figure(value[key], form, bare=True) for key in ("low", "high"))
    return text if low == high else f"{text} ({low}–{high})"


def _figure(value: float, form: str, bare: bool = False) -> str:
    if form == "share":
        return f"{100 * value:.1f}" + ("" if bare else " %")
    if form == "points":
        return f"{100 * value:.1f}"
    if form == "times":
        return f"{value:.2f}" + ("" if bare else " ×")
    if form == "seconds":
        return f"{value:.3g}" + ("" if bare else " s")
    if form == "bytes":
        return f"{value / (1 << 20):.0f}" + ("" if bare else " MiB")
    if form == "flops":
        return f"{value / 1e12:.3g}" + ("" if bare else " T")
    if form == "count":
        return f"{round(value):,}"
    return f"{value:.3g}"


def table_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """(head, lines): a line for each method, without columns that nobody has a figure for."""
    known = [column for column in columns if any(row[column.key] is not None for row in rows)]
    head = ["method", "draws in", *(f"{column.name} {column.better}".strip() for column in known)]
    lines = [
        [row["method"], KINDS[row["result"]], *(cell(row[column.key], column.form) for column in known)] for row in rows
    ]
    return head, lines


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[Any]) -> str:
    """The table in Markdown."""
    head, lines = table_of(rows, columns)
    body = [f"| {' | '.join(line)} |" for line in [head, *lines]]
    return "\n".join([body[0], "|" + "---|" * len(head), *body[1:]]) + "\n"


def terminal_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Any]) -> list[tuple[str, ...]]:
    """Figures down, methods across: as many methods as fit stay readable at 80 columns. The first line is the head."""
    head, lines = table_of(rows, columns)
    turned = list(zip(head, *lines))
    return [tuple(row) for row in turned]


def write_comparison(found: Mapping[str, Any], columns: Sequence[Any], folder: Path) -> Path:
    """compare.md and compare.html beside compare.json; returns the page. Raises OutputError."""
    files.write_text(folder / "compare.md", markdown(found["rows"], columns))
    head, *lines = terminal_table(found["rows"], columns)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    body = "".join("<tr>" + "".join(f"<td>{escape(one)}</td>" for one in line) + "</tr>" for line in lines)
    top = "".join(f"<th>{escape(one)}</th>" for one in head)
    grids = "".join(_grid(run) for run in found["runs"] if run["seed"] == 0)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(str(found["task"]))}: methods compared</title><style>
{style}</style></head>
<body><main style="padding-top:2rem"><h1>{escape(str(found["task"]))}: methods compared</h1>
<p class="lead">Means over seeds, the least and the most in brackets. FID of one-step results against the teacher's many steps.</p>
<div style="overflow-x:auto"><table style="white-space:nowrap"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>
<h2>Samples of equal noise</h2>
<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem">{grids}</div></main></body></html>
"""
    files.write_text(folder / "compare.html", page)
    return folder / "compare.html"


def _grid(run: Mapping[str, Any]) -> str:
    picture = Path(run["run"]) / "samples" / "after.png"
    if not picture.is_file():
        return ""
    source = base64.b64encode(picture.read_bytes()).decode()
    name = escape(run["method"], quote=True)
    return f"<figure><h3>{name}</h3><img src='data:image/png;base64,{source}' alt='Samples of {name}' style='width:100%'></figure>"
