"""Figures of the report, as SVG text that can stand inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pecker_fast.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pecker_fast.report.mask import MaskRow

# One colour, one meaning, on the whole page; distinguishable without red against green.
INK, FAINT, GRID = "#1f2933", "#52606d", "#e4e7eb"
BEFORE, AFTER, TEACHER, REAL = "#7b8794", "#0b6bcb", "#b7600a", "#0f7b5f"
FORGET, COVER, RETAIN, SCORE = "#c2334d", "#7a3fb0", "#0f7b5f", "#52606d"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names of tensors are names, whatever is in them
    "xtick.color": FAINT,
    "xtick.labelsize": 8.5,
    "ytick.color": FAINT,
    "ytick.labelsize": 8.5,
}
_MOST_POINTS = 400
_LONGEST = 40  # letters of a name
_SIZE_IN = (3.7, 2.9)  # about the width of a phone, so that letters stay readable there

Point = tuple[float, Mapping[str, Any]]
"""Position on the step axis, and the values logged there."""


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure that belongs to no window system."""
    return Figure(figsize=(width_in, height_in))


def loss_curves(steps: Sequence[Point], distill_end: float) -> str | None:
    """Losses over iterations, averaged over neighbours where there are too many to draw; None without a loss."""
    series = [("score_loss", "score", SCORE), ("retain_loss", "retain", RETAIN), ("forget_loss", "forget", FORGET)]
    with rc_context(STYLE):
        figure = new_figure(*_SIZE_IN)
        axes = figure.subplots(1, 1)
        drawn: list[float] = []
        for key, label, colour in series:
            x, y = _thin(*_series(steps, key))
            if x:
                axes.plot(x, y, color=colour, label=label, marker="o" if len(x) == 1 else None, linewidth=1.2)
                drawn += y
        if not drawn:
            return None
        low, high = min(drawn), max(drawn)
        if low > 0 and high > 50 * low:
            axes.set_yscale("log")
        elif max(abs(low), abs(high)) > 100:
            axes.set_yscale("symlog", linthresh=1.0)
        _stages(axes, distill_end)
        _finish(axes, "Losses", "step")
        return _svg(figure, "loss", "Losses of the score network and of both generator branches over training steps")


def accuracy_curves(evaluations: Sequence[Point], distill_end: float) -> str | None:
    """UA, cover rate and retain accuracy over steps; None without an evaluation."""
    series = [("ua", "UA", FORGET), ("cover_rate", "cover", COVER), ("retain_accuracy", "retain", RETAIN)]
    with rc_context(STYLE):
        figure = new_figure(*_SIZE_IN)
        axes = figure.subplots(1, 1)
        if not _lines(axes, evaluations, series):
            return None
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _stages(axes, distill_end)
        _finish(axes, "Forgetting and keeping", "step")
        return _svg(figure, "accuracy", "Unlearning accuracy, cover rate and retain accuracy over training steps")


def fid_curve(evaluations: Sequence[Point], levels: Sequence[tuple[str, Any, str]], distill_end: float) -> str | None:
    """Retain FID over steps, with a line for each known level (label, FID, colour); None without an FID."""
    with rc_context(STYLE):
        figure = new_figure(*_SIZE_IN)
        axes = figure.subplots(1, 1)
        if not _lines(axes, evaluations, [("fid", "one step, in the loop", AFTER)]):
            return None
        for label, level, colour in levels:
            if number(level) is not None:
                axes.axhline(level, color=colour, linestyle="--", linewidth=1.2, label=label)
        low, high = axes.get_ylim()
        if low > 0 and high > 30 * max(low, 1e-3):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        _stages(axes, distill_end)
        _finish(axes, "FID of the retain classes", "step")
        return _svg(figure, "fid", "FID of the retain classes over training steps")


def recovery_curves(curves: Mapping[str, Sequence[tuple[float, float]]], probe: str) -> str | None:
    """What comes back over the steps of an attack, a line for each subject of an audit; None without a curve."""
    tones = {"result": AFTER, "before": BEFORE, "relabel": FORGET}
    with rc_context(STYLE):
        figure = new_figure(*_SIZE_IN)
        axes = figure.subplots(1, 1)
        for name, curve in curves.items():
            x, y = [x for x, _ in curve], [y for _, y in curve]
            axes.plot(x, y, color=tones.get(name, REAL), label=name, marker="o", markersize=3)
        if not curves:
            return None
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(axes, f"Comes back: {probe}", "step of the attack")
        return _svg(
            figure, f"audit-{probe}", f"Share of samples that show the concept over the steps of the {probe} probe"
        )


def mask_blocks(blocks: Sequence[MaskRow], density: float) -> str:
    """Density of each part of the network."""
    with rc_context(STYLE):
        figure = new_figure(_SIZE_IN[0], 0.8 + 0.22 * len(blocks))
        draw_blocks(figure.subplots(1, 1), blocks, density)
        return _svg(figure, "blocks", "Share of weights the mask keeps in each block of the network")


def mask_layers(rows: Sequence[MaskRow], density: float) -> str:
    """Density of each tensor, in the order of the model."""
    with rc_context(STYLE):
        figure = new_figure(*_SIZE_IN)
        draw_layers(figure.subplots(1, 1), rows, density)
        return _svg(figure, "layers", "Share of weights the mask keeps in each tensor of the network")


def draw_blocks(axes: Axes, blocks: Sequence[MaskRow], density: float) -> None:
    """Horizontal bars, first block on top."""
    named = dict(enumerate(_short(block.name) for block in blocks))
    axes.barh(
        list(named), [block.density for block in blocks], color=AFTER, height=0.65, tick_label=list(named.values())
    )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.axvline(density, color=INK, linestyle="--", linewidth=1)
    top = max([block.density for block in blocks] + [density])
    axes.set_xlim(0, min(1.0, 1.15 * top) or 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_title("Kept weights, by block")


def _short(name: str) -> str:
    """A name that leaves room for what it names."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def draw_layers(axes: Axes, rows: Sequence[MaskRow], density: float) -> None:
    """One bar a tensor; biases and norms, with one dimension, in a lighter tone."""
    for colour, label, wanted in ((AFTER, "weights", False), ("#8fbce8", "biases, norms", True)):
        some = [(i, row.density) for i, row in enumerate(rows) if (len(row.shape) <= 1) is wanted]
        if some:
            axes.bar([i for i, _ in some], [y for _, y in some], color=colour, width=1.0, label=label, linewidth=0)
    axes.axhline(density, color=INK, linestyle="--", linewidth=1)
    axes.set_ylim(0, min(1.0, 1.15 * max([row.density for row in rows] + [density])) or 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "Kept weights, by tensor", "tensor, in the order of the model")


def _series(points: Sequence[Point], key: str) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, values in points if (y := number(values.get(key))) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    size = -(-len(x) // _MOST_POINTS)
    if size <= 1:
        return x, y
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    return [sum(x[p]) / len(x[p]) for p in parts], [sum(y[p]) / len(y[p]) for p in parts]


def _lines(axes: Axes, points: Sequence[Point], series: Sequence[tuple[str, str, str]]) -> bool:
    """Draw those series that have values; False when none has."""
    any_drawn = False
    for key, label, colour in series:
        x, y = _series(points, key)
        if x:
            axes.plot(x, y, color=colour, label=label, marker="o", markersize=3.5)
            any_drawn = True
    return any_drawn


def _stages(axes: Axes, distill_end: float) -> None:
    """Shade plain distillation, which comes before forgetting."""
    if distill_end > 0:
        axes.axvspan(0, distill_end, color=GRID, alpha=0.5, linewidth=0, label="distillation")


def _finish(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.figure.legend(handles, labels, ncols=len(handles) if len(handles) < 4 else 2, loc="outside lower center")


def _svg(figure: Figure, name: str, label: str) -> str:
    """SVG text without fixed size, its ids made unique by `name`, described by `label`."""
    with rc_context({"svg.hashsalt": name}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(label, quote=True)}">{body.strip()}'
