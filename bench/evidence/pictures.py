"""The figures of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import tensor

from evidence.outcome import IMAGES_PER_ITERATION, Outcome
from evidence.plan import PAIRS, Arm

COLOURS = ("#444444", "#d1495b", "#edae49", "#00798c", "#66a182", "#2e4057", "#8d6a9f", "#c97b2a", "#9bc53d")


def draw(study: dict[str, Any], found: dict[Arm, list[Outcome]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    paths(study, folder / "study_paths.png")
    trade(found, folder / "study_trade.png")


def paths(study: dict[str, Any], path: Path) -> None:
    """UA and retain FID against images, mean over the seeds of the first pair."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = list(dict.fromkeys(Arm(**run["arm"]) for run in study["final"]))
    for arm, colour in zip(arms, COLOURS):
        runs = [r for r in study["final"] if Arm(**r["arm"]) == arm and tuple(r["pair"]) == PAIRS[0]]
        images = [h["step"] * IMAGES_PER_ITERATION for h in runs[0]["history"]]
        for axes, key in ((left, "ua"), (right, "fid")):
            curves = tensor([[float("nan") if h[key] is None else h[key] for h in run["history"]] for run in runs])
            axes.plot(images, curves.mean(0).tolist(), color=colour, label=arm.label, lw=1.6)
            axes.fill_between(images, curves.amin(0).tolist(), curves.amax(0).tolist(), color=colour, alpha=0.12, lw=0)
    for axes, title in ((left, "UA (band: all seeds)"), (right, "retain FID")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("one-step samples drawn")
        axes.grid(alpha=0.25)
    right.set_yscale("log")
    left.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def trade(found: dict[Arm, list[Outcome]], path: Path) -> None:
    """Every final run: images to UA ≥ 99 % against the retain FID at the end."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for (arm, runs), colour in zip(found.items(), COLOURS):
        axes.scatter(
            [o.images for o in runs], [o.fid_end for o in runs], color=colour, s=26, label=arm.label, alpha=0.8
        )
    axes.set_xlabel("one-step samples drawn until UA ≥ 99 %")
    axes.set_ylabel("retain FID at the end")
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
