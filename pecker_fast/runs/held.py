"""A run folder opened again: its recipe, what that names, and the model it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pecker_fast import files
from pecker_fast.errors import ModelError, OutputError
from pecker_fast.loading import Model, load_model
from pecker_fast.networks import Denoiser, load_unet
from pecker_fast.recipe import Recipe, load_recipe
from pecker_fast.records import PIPELINE, RECIPE, Inputs, read_inputs

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

    @property
    def pipeline(self) -> Path:
        """The exported generator. Raises OutputError where there is none yet."""
        if not (self.folder / PIPELINE).is_dir():
            raise OutputError(
                f"{self.folder}: the run has no {PIPELINE}/ yet; resume it, or `pecker-fast export` its last checkpoint"
            )
        return self.folder / PIPELINE


def load_run(path: str | Path) -> Run:
    """Raises OutputError when `path` is no run folder."""
    folder = Path(path)
    if not (folder / RECIPE).is_file():
        raise OutputError(f"{folder}: not a run folder (no {RECIPE}); `pecker-fast train` makes one")
    return Run(folder, load_recipe(folder / RECIPE), read_inputs(folder))


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
    if run.inputs is not None:
        found = files.hash_of(model.base_unet())
        if found != run.inputs.base_sha256:
            raise ModelError(
                f"{model.folder}: not the model this run began with (sha256 of its UNet {found[:12]}…, then "
                f"{run.inputs.base_sha256[:12]}…); put that one back"
            )
    return model


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
    return load_model(recipe.model_copy(update=given), prompts, result=True)


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
