"""`evaluate --protocol`: what a run's model still draws, by a protocol of docs/concepts.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pecker_fast.conditions import concept_names, placed, read_prompts
from pecker_fast.errors import RecipeError, memory_errors
from pecker_fast.evaluate import (
    PROTOCOLS,
    Prompt,
    WordJudge,
    canvas_prompts,
    celebrity,
    clip_score,
    i2p,
    load_clip,
    load_detector,
    load_word_judge,
    unlearncanvas,
)
from pecker_fast.networks import TextTable
from pecker_fast.runs.finished import drawing, tell_cut
from pecker_fast.runs.held import judge_of, load_run
from pecker_fast.runs.judging import EVALUATION_SEED
from pecker_fast.runs.prompt_judging import PromptJudging, judging_of


@memory_errors("judge fewer samples, or free memory")
def evaluate_protocol(
    run_dir: str | Path,
    protocol: str,
    detectors: Sequence[str] = (),
    prompts: str | Path | None = None,
    seeds: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    before: bool = False,
    clip: str | Path | None = None,
) -> dict[str, Any]:
    """Figures of a protocol of docs/concepts.md over the exported generator (before: over what θ started as).

    detectors: judge folders or module:function. prompts: a file; None = the run's own forget prompts. seeds: images of each
    prompt. samples: images of each group, for `classes` and `clip`. clip: folder of a CLIP model, for `clip`. Raises RecipeError,
    ModelError, DataError.
    """
    run = load_run(run_dir)
    if protocol not in PROTOCOLS:
        raise RecipeError(f"protocol: {protocol!r}; give one of {', '.join(PROTOCOLS)}")
    if not run.recipe.uses_prompts:
        raise RecipeError("protocol: protocols are for text-to-image runs; this run's model draws from classes")
    _check_given(protocol, detectors, prompts, clip)
    found = [load_detector(detector) for detector in detectors]
    similarity = load_clip(clip) if clip is not None else None
    concepts = concept_names(run.recipe.forget)
    file = placed(read_prompts(prompts), concepts) if prompts is not None else None
    judge = judge_of(run) if protocol in ("classes", "unlearncanvas") else None
    words = _canvas_judge(judge, concepts) if judge is not None and protocol == "unlearncanvas" else None
    texts: Sequence[str] = file.texts if file else ()
    if words is not None:
        texts = [text for group in canvas_prompts(words.attributes, concepts) for text in group]
    model, start = drawing(run, before, texts, judge)
    tell_cut(model, texts)
    judging = judging_of(run.recipe, model)
    assert isinstance(judging, PromptJudging)
    sampler, table, judged = judging.of(start), judging.table, judging.judged
    number = EVALUATION_SEED if seed is None else seed
    if protocol == "classes":
        if not judging.possible:
            raise RecipeError("protocol: classes needs a judge of words beside the model, or evaluate.judge")
        return judging.figures(sampler, samples or run.recipe.evaluate.final or 2000, number)
    if words is not None:
        rows = dict(zip(texts, table.index(texts)))
        return unlearncanvas(sampler, words, concepts, rows, seeds or 5)
    if similarity is not None:
        forget, kept = (_asked(table, group) for group in (judged.forget, judged.retain))
        covers = [table.prompts[row] for row in judged.cover]
        groups = {"forget": (forget, None), "forget:cover": (forget, covers), "retain": (kept, None)}
        if file:
            groups = {"prompts": (_asked(table, table.index(texts)), None)}
        return clip_score(sampler, groups, similarity, samples or 500, number)
    asked = _asked(table, table.index(texts) if file else judged.forget)
    if protocol == "celebrity":
        return celebrity(sampler, asked, found[0], seeds or 20, number) | {"seed": number}
    of_file = (file.seeds, file.categories) if file else (None, None)
    figures = i2p(sampler, asked, found, seeds or 10, number, *of_file)
    return figures | {"seed": number if of_file[0] is None else None}  # None: of each prompt, as the file has them


def _check_given(protocol: str, detectors: Sequence[str], prompts: object, clip: object) -> None:
    """Raise RecipeError for what a protocol has no use for, and where it lacks what it judges by."""
    if (protocol == "clip") != (clip is not None):
        raise RecipeError("clip: protocol clip takes a folder of a CLIP model (--clip), and no other does")
    if protocol == "celebrity" and len(detectors) != 1:
        raise RecipeError(f"detector: celebrity takes one --detector, got {len(detectors)}")
    if protocol == "i2p" and not detectors:
        raise RecipeError("detector: i2p takes at least one --detector, got 0")
    if protocol in ("classes", "unlearncanvas") and (detectors or prompts):
        raise RecipeError(
            f"detector: {protocol} is judged by the run's judge of words and has its own prompts; give neither"
        )
    if protocol == "clip" and detectors:
        raise RecipeError("detector: clip is judged by its CLIP folder; leave detectors out")


def _canvas_judge(folder: str, concepts: Sequence[str]) -> WordJudge:
    """Raises RecipeError for a judge of classes, and where no concept has a name."""
    words = load_word_judge(folder)
    if words is None or not concepts:
        raise RecipeError(
            "protocol: unlearncanvas needs a judge of words (style, object), and a concept that is forgotten by name"
        )
    return words


def _asked(table: TextTable, rows: Sequence[int]) -> list[Prompt]:
    return [Prompt(row, table.prompts[row]) for row in rows]
