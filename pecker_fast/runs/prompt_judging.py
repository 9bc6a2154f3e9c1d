"""Judging a text-to-image run: the same figures and grids as for classes, over prompts and the words in them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.conditions import Conditions
from pecker_fast.evaluate import Prompt, Sampler, WordJudge, fid, precision_recall, word_figures
from pecker_fast.forgetting import save_grid
from pecker_fast.loading import Model
from pecker_fast.networks import TextDenoiser, TextTable
from pecker_fast.recipe import Recipe
from pecker_fast.runs.judging import EVALUATION_SEED, GRID_COLUMNS, GRID_SEED, BaseJudging, Drawing, Judging

ROWS = 3  # prompts of each kind in a grid
NEIGHBOURS = 3  # of precision and recall


def judging_of(recipe: Recipe, parts: Model, drawing: Drawing = nullcontext) -> Judging | PromptJudging:
    """What judges this run: by classes or by prompts."""
    return (Judging if parts.text is None else PromptJudging)(recipe, parts, drawing)


class PromptJudging(BaseJudging):
    """Figures by a judge of words, where there is one; grids always."""

    def __init__(self, recipe: Recipe, parts: Model, drawing: Drawing = nullcontext) -> None:
        super().__init__(recipe, parts, drawing)
        assert parts.text is not None
        assert isinstance(parts.teacher, TextDenoiser)
        self.judged: Conditions = parts.text.judged
        self.table: TextTable = parts.teacher.table

    @property
    def possible(self) -> bool:
        return self.parts.words is not None

    def figures(self, sampler: Sampler, samples: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
        """UA, cover rate and what else of the prompts is obeyed, see `word_figures`; FID, precision and recall of the retain
        samples against the judge's real images without the forgotten words, where it has such."""
        judge, c = self.parts.words, self.judged
        assert judge is not None
        kept, features = set(c.retain), []

        def noted(rows: Tensor, number: int) -> Tensor:
            images = sampler(rows, number)
            if int(rows[0]) in kept:
                features.append(judge.features(images))
            return images

        figures = self.shares(noted, samples, seed)
        figures |= {"seed": seed, **dict.fromkeys(("fid", "inception_score", "precision", "recall"))}
        table = self.table.prompts
        real = self._real(judge, [table[row] for row in c.forget], [table[row] for row in c.cover])
        if real is not None and samples > NEIGHBOURS:
            drawn = torch.cat(features)
            figures["fid"] = fid(real, drawn)
            figures["precision"], figures["recall"] = precision_recall(real, drawn, k=NEIGHBOURS)
        return figures

    def shares(self, sampler: Sampler, samples: int, seed: int = EVALUATION_SEED) -> dict[str, Any]:
        """`figures` without what compares distributions."""
        judge, c = self.parts.words, self.judged
        assert judge is not None
        forget, retain = ([Prompt(row, self.table.prompts[row]) for row in group] for group in (c.forget, c.retain))
        return word_figures(sampler, judge, forget, [self.table.prompts[row] for row in c.cover], retain, samples, seed)

    def _real(self, judge: WordJudge, forget: list[str], covers: list[str]) -> Tensor | None:
        """Features of real images without the forgotten word; None without a reference, or with several words of a kind."""
        gone: dict[str, set[str]] = {}
        for prompt, cover in zip(forget, covers):
            wanted = judge.expected(cover)
            for attribute, word in judge.expected(prompt).items():
                if wanted.get(attribute) != word:
                    gone.setdefault(attribute, set()).add(word)
        if not judge.has_reference or any(len(words) > 1 for words in gone.values()):
            return None
        return judge.reference_features({attribute: words.copy().pop() for attribute, words in gone.items()})

    def grid(self, sampler: Sampler, path: Path) -> Path:
        """Rows of images: prompts to forget, their covers, the retain prompts nearest to them, other retain prompts."""
        rows = grid_rows(self.judged, self.table)
        labels = torch.tensor([row for row, _ in rows]).repeat_interleave(GRID_COLUMNS)
        lines = [f"{kind}: {self.table.prompts[row]}" for row, kind in rows]
        files.write_text(path.with_name("prompts.txt"), "\n".join(lines) + "\n")
        return save_grid(sampler(labels, GRID_SEED), GRID_COLUMNS, path)

    def trust(self, teacher: dict[str, Any] | None) -> dict[str, Any] | None:
        if self.parts.words is None:
            return None
        return {
            "held_out_accuracy": self.parts.words.info.get("held_out_accuracy"),
            "teacher_accuracy": (teacher or {}).get("retain_accuracy"),
            "fid_floor": None,
            "reference_samples": None,
        }


def grid_rows(c: Conditions, table: TextTable) -> list[tuple[int, str]]:
    """(row of the table, kind) of a grid's rows."""
    near = neighbours(c, table, ROWS)
    other = [row for row in c.retain if row not in near]
    step = max(1, len(other) // ROWS)
    pairs = list(dict.fromkeys(zip(c.forget, c.cover)))
    pairs = pairs[:: max(1, len(pairs) // ROWS)][:ROWS]
    rows = [(f, "forget") for f, _ in pairs] + [(o, "cover") for _, o in pairs]
    return rows + [(row, "neighbour") for row in near] + [(row, "retain") for row in other[::step][:ROWS]]


def neighbours(c: Conditions, table: TextTable, count: int) -> list[int]:
    """The retain prompts whose text is nearest to what is forgotten (cosine of the mean embedding)."""

    def mean(rows: tuple[int, ...]) -> Tensor:
        vectors = table.embeds[torch.tensor(rows, device=table.embeds.device)].float().mean(1)
        return torch.nn.functional.normalize(vectors, dim=1)

    nearness = (mean(c.retain) @ mean(c.forget).T).amax(1)
    return [c.retain[i] for i in nearness.topk(min(count, len(c.retain))).indices.tolist()]
