"""What is looked at before any weights are read: the kind of the model, its configs, its schedule against the recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from pecker_kernels import native
from pecker_kernels.dispatch import triton_available

from pecker_fast import files
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.loading.text_parts import config_folder
from pecker_fast.networks import Denoiser, check_class_folder, is_text_model, text_model
from pecker_fast.recipe import MEANT_FOR, Recipe, Timesteps


def check_source(recipe: Recipe, source: Path, result: bool = False) -> None:
    """Raise RecipeError or ModelError where the recipe's model is of the other kind, or of one that is not followed.

    result: a one-step generator is wanted, to be drawn from.
    """
    check_kind(recipe, source)
    if recipe.uses_prompts:
        text_model.check_source(source, config_folder(recipe, source), result)
    else:
        check_class_folder(source, result)


def check_norms(recipe: Recipe, device: torch.device) -> None:
    """Raises RecipeError where fused norms are asked for and the kernels cannot serve them."""
    if recipe.engine.norms == "plain":
        return
    if recipe.engine.compile != "none":
        raise RecipeError("engine.norms: engine.compile fuses norms itself; use engine.norms=plain")
    if device.type == "cpu" and (recipe.precision == "bf16" or recipe.engine.weights == "bf16"):
        raise RecipeError(
            "engine.norms: on a CPU fused norms are of float32; use precision=fp32, or engine.norms=plain"
        )
    if device.type == "cpu" and not native.available():
        raise RecipeError(
            "engine.norms: the compiled kernels are not installed; use engine.norms=plain, or install them"
        )
    if device.type == "cuda" and not triton_available():
        raise RecipeError("engine.norms: triton is not installed; use engine.norms=plain, or install it")


def look_at_hub(recipe: Recipe) -> tuple[str, ...] | None:
    """Notes on the recipe's hub model, of which only what is small is fetched; None where the hub cannot be asked.

    Raises RecipeError or ModelError for a model that is refused by its configs.
    """
    folder = files.look_at_hub(recipe.model, recipe.revision)
    if folder is None:
        return None
    check_kind(recipe, folder)
    if recipe.uses_prompts:
        text_model.check_text_folder(folder)
    return tuple(files.model_notes(folder))


def check_kind(recipe: Recipe, folder: Path) -> None:
    """Raises RecipeError where prompts are given for classes, or classes for prompts."""
    if folder.is_file():
        files.check_tensors(folder, error=ModelError)
    text = folder.is_file() or is_text_model(folder)
    if text and not recipe.uses_prompts:
        raise RecipeError(
            f"forget: {recipe.forget!r} is a class; {recipe.model} draws from text, name a concept or prompts"
        )
    if recipe.uses_prompts and not text:
        raise RecipeError(f"forget: prompts are given, and {recipe.model} draws from classes; name class numbers")


def fit_timesteps(recipe: Recipe, length: int) -> Recipe:
    """The recipe with all of `timesteps` as positions on a schedule of `length` steps: those it gives stay as they are, the
    defaults, which are meant for `MEANT_FOR` steps, keep their share. Raises RecipeError where they then do not fit."""
    given = recipe.timesteps.model_fields_set
    if length == MEANT_FOR or given >= set(Timesteps.model_fields):
        return recipe
    positions = {
        name: value if name in given else round(value * length / MEANT_FOR)
        for name, value in recipe.timesteps.model_dump().items()
    }
    if positions["min"] >= positions["max"]:
        raise RecipeError(
            f"timesteps.min: {positions['min']} must be below timesteps.max, {positions['max']}, on the model's schedule of "
            f"{length} steps; give both"
        )
    return recipe.model_copy(update={"timesteps": Timesteps(**positions)})


def timesteps_note(recipe: Recipe, length: int) -> str | None:
    """What is told of a schedule of another length than the defaults are meant for. recipe: as the user gave it."""
    if length == MEANT_FOR:
        return None
    found = fit_timesteps(recipe, length).timesteps
    told = ", ".join(f"{name} {value}" for name, value in found.model_dump().items())
    return (
        f"the model's schedule has {length} timesteps, not {MEANT_FOR}: timesteps {told} are positions on it (defaults keep "
        "their share, what the recipe gives is taken as it stands)"
    )


def check_schedule(recipe: Recipe, teacher: Denoiser) -> None:
    """Timesteps, guidance and dropout the model can follow; raises RecipeError."""
    last = teacher.schedule.num_timesteps
    for key in ("init", "min", "max"):
        value = getattr(recipe.timesteps, key)
        if value > last - (key != "max"):
            raise RecipeError(f"timesteps.{key}: {value} is beyond the model's schedule of {last} timesteps")
    if recipe.evaluate.teacher_steps > last:
        raise RecipeError(f"evaluate.teacher_steps: {recipe.evaluate.teacher_steps} is beyond the schedule of {last}")
    if float(teacher.schedule.a[: recipe.timesteps.max].min()) <= 0:
        raise RecipeError(f"timesteps.max: the schedule has no signal left below {recipe.timesteps.max}; lower it")
    if teacher.null_class is None:
        guided = {key: getattr(recipe.guidance, key) for key in ("score_train", "score", "teacher")}
        for key, value in guided.items():
            if value != 1:
                raise RecipeError(
                    f"guidance.{key}: {value:g} needs a model with a null class; use 1, or give null_class"
                )
        if recipe.guidance.text_dropout > 0:
            raise RecipeError("guidance.text_dropout: needs a model with a null class; use 0, or give null_class")
