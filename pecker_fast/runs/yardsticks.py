"""Rows of a comparison that nothing is trained for: a model that never knew, and sampling that is steered away (SLD)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast import files
from pecker_fast.conditions import concept_names
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.evaluate import Sampler
from pecker_fast.forgetting import sld_sample
from pecker_fast.loading import Model, load_model
from pecker_fast.recipe import Recipe
from pecker_fast.runs.prompt_judging import judging_of

SLD, NEVER = "sld", "never knew"
KINDS = {SLD: "sampling", NEVER: "never"}


def judged(
    recipe: Recipe, name: str, never: str | None, folder: Path, teacher: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Figures of a yardstick: {"after", "teacher"}, as a run's metrics.json has them; kept in `folder`, with a grid, and taken from
    there where they were made for the same recipe.

    never: the model of `NEVER`. teacher: its figures, where they are known. Raises RecipeError, ModelError, OutputError.
    """
    asked = {"yardstick": name, "never": never, "task": _task(recipe)}
    kept = folder / "figures.json"
    if kept.is_file():
        found = files.read_json(kept, error=OutputError)
        if found.get("asked") == asked:
            return dict(found)
    base = load_model(recipe, prompts=concepts(recipe) if name == SLD else ())
    samples = recipe.evaluate.final
    sampler = away_from(recipe, base) if name == SLD else _of_twin(recipe, base, never)
    judging = judging_of(recipe, base)
    files.make_folder(folder / "samples")
    judging.grid(sampler, folder / "samples" / "after.png")
    found = {"asked": asked, "after": None, "teacher": None}
    if judging.possible and samples:
        found["after"] = judging.figures(sampler, samples)
        found["teacher"] = teacher or judging.figures(judging.multi_step(), samples)
    files.write_json(kept, found)
    return found


def concepts(recipe: Recipe) -> list[str]:
    """The words that SLD steers away from. Raises RecipeError for a recipe that has none."""
    names = concept_names(recipe.forget) if recipe.uses_prompts else []
    if not names:
        raise RecipeError(f"--methods: {SLD} steers prompts away from a concept; this recipe forgets none by name")
    if len(names) > 1:
        raise RecipeError(f"--methods: {SLD} steers away from one concept, this recipe forgets {len(names)}")
    return list(names)


def away_from(recipe: Recipe, base: Model) -> Sampler:
    """The model's own sampler, steered away from the recipe's concept."""
    teacher: Any = base.teacher
    if teacher.null_class is None:
        raise RecipeError(f"--methods: {SLD} needs a model with an empty prompt")
    (row,) = teacher.table.index(concepts(recipe))
    steps, guidance = recipe.evaluate.teacher_steps, recipe.guidance.teacher
    return lambda labels, seed: sld_sample(teacher, labels, row, steps, seed, guidance)


def _of_twin(recipe: Recipe, base: Model, never: str | None) -> Sampler:
    """How the model that never knew draws, asked as the recipe asks."""
    if never is None:
        raise RecipeError(f"--methods: {NEVER} needs a model; give --never FOLDER_OR_NAME")
    twin = load_model(recipe.model_copy(update={"model": never, "revision": None, "generator": None}))
    if twin.teacher.sample_shape != base.teacher.sample_shape:
        raise RecipeError(
            f"--never {never}: its samples are {twin.teacher.sample_shape}, the model's {base.teacher.sample_shape}"
        )
    return _translated(base, twin, judging_of(recipe, twin).multi_step())


def _translated(base: Model, twin: Model, sampler: Sampler) -> Sampler:
    """Rows of a prompt table mean the same prompts in the other's."""
    if base.text is None:
        return sampler
    ours: Any = base.teacher
    theirs: Any = twin.teacher

    def sample(labels: Tensor, seed: int) -> Tensor:
        rows = theirs.table.index([ours.table.prompts[int(row)] for row in labels])
        return sampler(labels.new_tensor(rows), seed)

    return sample


def _task(recipe: Recipe) -> dict[str, Any]:
    keys = ("model", "forget", "cover", "retain", "guidance", "evaluate", "resolution", "null_class")
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key in keys}
