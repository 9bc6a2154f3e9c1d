"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pecker_fast.evaluate import Verdict, share, verdict_of
from pecker_fast.export.markdown import block, code, plain
from pecker_fast.recipe import Recipe, recipe_to_yaml

SHARES = ("ua", "cover_rate", "retain_accuracy", "ira", "cra")


@dataclass(frozen=True)
class Card:
    """What every card says, whatever the model draws from.

    metrics: `before`, `after`, `teacher` of metrics.json; None where these weights were not judged.
    """

    recipe: Recipe
    base_sha256: str
    weights_sha256: str
    metrics: dict[str, Any] | None = None

    @property
    def verdict(self) -> Verdict:
        metrics = self.metrics or {}
        return verdict_of(metrics, metrics.get("forget_steps", self.recipe.steps))

    def markdown(self, forgotten: str, usage: str, judged: str, tag: str = "", pictures: str = "") -> str:
        """What was forgotten, how to draw, how good it is, hashes, the recipe.

        forgotten: in words, escaped here. usage: Python that draws with stock diffusers. judged: what the figures mean.
        tag: a line of the card's header, with its end. pictures: a section of its own.
        """
        recipe, verdict = self.recipe, self.verdict
        kind = "One-step generator" if recipe.one_step else "Diffusion model"
        draws = (
            f"It draws an image in **one** network evaluation at timestep {recipe.timesteps.init}.\n"
            "It is not a denoiser: do not run it over many steps."
            if recipe.one_step
            else "It draws as its base does: with the samplers, steps and guidance that one takes."
        )
        said = f"{judged}\n\nVerdict: {plain(verdict.line())}." if verdict.figures else judged
        return f"""---
library_name: diffusers
{tag}tags: [diffusion, unlearning{", one-step" if recipe.one_step else ""}]
---
# {kind} that {plain(verdict.said_of(forgotten))}

Made by `pecker-fast train` with the method `{recipe.method}`, from the model {code(recipe.model)}.
{draws}

## Draw with stock diffusers

{block(usage, "python")}

## Figures

{said}

{figures_table(self.metrics)}

{pictures}## Hashes

sha256 of the base model's weights: {code(self.base_sha256)}
sha256 of these weights: {code(self.weights_sha256)}

## Recipe

{block(recipe_to_yaml(recipe), "yaml")}
"""


def figures_table(metrics: dict[str, Any] | None) -> str:
    """Markdown table of the figures of `before`, `after` and `teacher`."""
    names = ("ua", "cover_rate", "retain_accuracy", "ira", "cra", "fid", "inception_score", "precision", "recall")
    columns = [(metrics or {}).get(key) or {} for key in ("before", "after", "teacher")]
    if not all(columns[:2]):  # the teacher's row may be missing
        return "Not evaluated."
    known = [name for name in (*names, "samples", "seed") if any(name in column for column in columns)]
    rows = [f"| {name} | " + " | ".join(_figure(column, name) for column in columns) + " |" for name in known]
    return "\n".join(["| | before | after | teacher, multi-step |", "|---|---|---|---|", *rows])


def _figure(column: Mapping[str, Any], name: str) -> str:
    """A figure, shares with their 95 % interval."""
    value = column.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if name in ("samples", "seed"):
        return str(value)
    interval = share(column, name) if name in SHARES else None
    return f"{value:.4g}" + (f" ({interval.low:.3g} … {interval.high:.3g})" if interval else "")
