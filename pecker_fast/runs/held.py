"""A run folder opened again: its recipe, what that names, and the model it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pecker_fast import files
from pecker_fast.errors import ModelError, OutputError
from pecker_fast.loading import Model, check_exported, load_model, start_of
from pecker_fast.networks import Denoiser, load_unet
from pecker_fast.recipe import Recipe, load_recipe
from pecker_fast.records import (
    PIPELINE,
    RECIPE,
    Inputs,
    check_prompts,
    check_run,
    known_base,
    known_start,
    read_inputs,
)

BASE_KEYS = ("model", "model_config", "generator")


@dataclass(frozen=True)
class Run:
    """A run folder with its resolved recipe in the user's words; `inputs` is None for a run of an earlier version."""

    folder: Path
    recipe: Recipe
    inputs: Inputs | None = None

    def located(self, needed: tuple[str, ...] = ()) -> Recipe:
        """The recipe with paths as they are now, and without prompt files. Raises ModelError where one of `needed` is gone."""
        return self.recipe if self.inputs is None else self.inputs.located(self.recipe, self.folder, needed)

    @cached_property
    def pipeline(self) -> Path:
        """The exported generator. Raises OutputError where there is none yet, ModelError where it is not what was exported."""
        if not (self.folder / PIPELINE).is_dir():
            raise OutputError(
                f"{self.folder}: the run has no {PIPELINE}/ yet; resume it, or `pecker-fast export` its last checkpoint"
            )
        check_exported(self.folder / PIPELINE, f"`pecker-fast export {self.folder}` writes it again")
        return self.folder / PIPELINE


def load_run(path: str | Path) -> Run:
    """Raises OutputError when `path` is no run folder, CheckpointError when its recipe or inputs are not its own any more."""
    folder = Path(path)
    if not (folder / RECIPE).is_file():
        raise OutputError(f"{folder}: not a run folder (no {RECIPE}); `pecker-fast train` makes one")
    run = Run(folder, load_recipe(folder / RECIPE), read_inputs(folder))
    check_run(folder, run.recipe, run.inputs)
    return run


def trained_generator(run: Run, model: Model) -> Denoiser:
    """θ as exported in `pipeline/`."""
    return model.teacher.with_network(load_unet(run.pipeline / "unet")).freeze()


def base_model(run: Run, prompts: Sequence[str] = (), judge: str | None = None) -> Model:
    """The model that the run began with. judge: a folder, to judge by; None = the run's.

    Raises ModelError where the model is gone, or another one lies in its place.
    """
    recipe = run.located(BASE_KEYS)
    if judge is not None:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"judge": judge})})
    model = load_model(recipe, prompts)
    _check_base(run, recipe, model)
    check_prompts(run.folder, model.text.prompts_sha256 if model.text is not None else None)
    return model


def _check_base(run: Run, recipe: Recipe, model: Model) -> None:
    then = known_base(run.folder, run.inputs)
    now, what = "", "its UNet"
    if then is not None:
        now = files.hash_of(model.base_unet())
    elif model.text is None and (then := known_start(run.folder)) is not None:
        now, what = start_of(recipe, model), "what it starts from"
    if then is not None and now != then:
        raise ModelError(
            f"{model.folder}: not the model this run began with (sha256 of {what} {now[:12]}…, then {then[:12]}…); put that one "
            "back"
        )


def held_model(run: Run, prompts: Sequence[str] = (), judge: str | None = None) -> Model:
    """The model in the run's own `pipeline/`, its UNet the trained θ; the base is not opened. judge: a folder, to judge by."""
    recipe = run.located()
    given = {
        "model": str(run.pipeline),
        "config_folder": None,
        "revision": None,
        "engine": recipe.engine.model_copy(update={"weights": "fp32"}),
        "evaluate": recipe.evaluate.model_copy(update={"judge": judge}),
    }
    model = load_model(recipe.model_copy(update=given), prompts, result=True)
    check_prompts(run.folder, model.text.prompts_sha256 if model.text is not None else None)
    return model


def judge_of(run: Run) -> str:
    """Folder of the run's judge: the recipe's, or the one beside the model. Raises ModelError where there is none."""
    recipe = run.located(("evaluate.judge",))
    if recipe.evaluate.judge is not None:
        return recipe.evaluate.judge
    recipe = run.located(("model", "model_config"))
    beside = files.resolve_model(recipe.config_folder or recipe.model, recipe.revision) / "judge"
    if not beside.is_dir():
        raise ModelError(f"evaluate: the model folder has no judge/ ({beside}); give --judge FOLDER")
    return str(beside)
