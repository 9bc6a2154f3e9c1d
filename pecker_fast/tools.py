"""The verbs over a finished run: draw from it, judge it again, export it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pecker_fast import io_safe
from pecker_fast.checkpoint import latest_checkpoint, load_network, read_checkpoint_stage, verify_checkpoint
from pecker_fast.config import Recipe, load_recipe
from pecker_fast.denoiser import Denoiser, load_unet
from pecker_fast.errors import CheckpointError, OutputError, RecipeError
from pecker_fast.exports import export_run_folder
from pecker_fast.judging import EVALUATION_SEED
from pecker_fast.parts import Model, load_model, load_parts, load_start
from pecker_fast.prompt_judging import grid_rows, judging_of
from pecker_fast.run_folder import METRICS, PIPELINE, RECIPE, warn
from pecker_fast.sample import grid_labels, one_step_sample, save_grid
from pecker_fast.text_denoiser import TextDenoiser


@dataclass(frozen=True)
class Run:
    """A run folder with its resolved recipe."""

    folder: Path
    recipe: Recipe


def load_run(path: str | Path) -> Run:
    """Raises OutputError when `path` is no run folder."""
    folder = Path(path)
    if not (folder / RECIPE).is_file():
        raise OutputError(f"{folder}: not a run folder (no {RECIPE}); `pecker-fast train` makes one")
    return Run(folder, load_recipe(folder / RECIPE))


def trained_generator(run: Run, model: Model) -> Denoiser:
    """θ as exported in `pipeline/`."""
    if not (run.folder / PIPELINE).is_dir():
        raise OutputError(
            f"{run.folder}: the run has no {PIPELINE}/ yet; resume it, or `pecker-fast export` its last checkpoint"
        )
    return model.teacher.with_network(load_unet(run.folder / PIPELINE / "unet")).freeze()


def sample_run(
    run_dir: str | Path,
    classes: Sequence[int] | None = None,
    count: int = 8,
    seed: int = 0,
    output: str | Path | None = None,
    before: bool = False,
    prompts: Sequence[str] | None = None,
) -> Path:
    """Draw `count` images of each class or prompt into one PNG grid, one a row; before=True draws from what θ started as.

    classes: None = all the model can draw. prompts: of a text-to-image run; None = the grid of its own prompts.
    Raises RecipeError for a class out of range. Returns the PNG's path.
    """
    run = load_run(run_dir)
    if count < 1:
        raise RecipeError(f"count: {count} images; give at least 1")
    if before and run.recipe.distill_steps:
        raise RecipeError("before: this run distilled its own start, which is not kept; see samples/before.png")
    given, other = ("prompts", "classes") if run.recipe.uses_prompts else ("classes", "prompts")
    if (classes if given == "prompts" else prompts) is not None:
        raise RecipeError(f"{other}: this run's model draws from {given}; give {given}")
    model = load_model(run.recipe, prompts or ())
    wanted = _wanted(model, classes, prompts)
    generator = load_start(run.recipe, model.teacher)[0].freeze() if before else trained_generator(run, model)
    images = one_step_sample(generator, grid_labels(wanted, count), seed, run.recipe.timesteps.init)
    name = f"{'before' if before else 'sample'}-seed{seed}.png"
    return save_grid(images, count, Path(output) if output else run.folder / "samples" / name)


def _wanted(model: Model, classes: Sequence[int] | None, prompts: Sequence[str] | None) -> list[int]:
    """Conditions to draw, a row each."""
    teacher = model.teacher
    if isinstance(teacher, TextDenoiser) and model.text is not None:
        if prompts is not None:
            return list(teacher.table.index(prompts))
        return [row for row, _ in grid_rows(model.text.judged, teacher.table)]
    wanted = list(classes) if classes else teacher.classes
    for c in wanted:
        if c not in teacher.classes:
            raise RecipeError(f"classes: {c} is out of range; the model's classes are {teacher.classes}")
    return wanted


def evaluate_run(
    run_dir: str | Path, samples: int | None = None, seed: int | None = None, judge: str | Path | None = None
) -> dict[str, Any]:
    """Judge the exported generator again: {"before", "after", "teacher"} with `after` new and the others as recorded."""
    run = load_run(run_dir)
    recipe = run.recipe
    if judge is not None:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"judge": str(judge)})})
    parts = load_model(recipe)
    if parts.judge is None and parts.words is None:
        raise RecipeError("evaluate: the model folder has no judge/; give --judge FOLDER")
    judging = judging_of(recipe, parts)
    sampler = judging.one_step(trained_generator(run, parts))
    after = judging.figures(
        sampler, samples or recipe.evaluate.final or 2000, EVALUATION_SEED if seed is None else seed
    )
    recorded = io_safe.read_json(run.folder / METRICS) if (run.folder / METRICS).is_file() and judge is None else {}
    return {"before": recorded.get("before"), "after": after, "teacher": recorded.get("teacher")}


def export_run(run_dir: str | Path, output: str | Path | None = None, weights: str = "ema") -> Path:
    """Write the pipeline folder from the newest checkpoint; weights: "ema" (the average) or "raw"."""
    run = load_run(run_dir)
    if weights not in ("ema", "raw"):
        raise RecipeError(f"weights: {weights!r}; give ema or raw")
    target = Path(output) if output else run.folder / PIPELINE
    if weights == "raw" and output is None:
        raise RecipeError("weights: raw weights do not replace the run's pipeline/; give --output FOLDER")
    if target.exists() and not _is_export(target):
        raise OutputError(f"{target}: exists and is no exported generator; give another output")
    checkpoint = latest_checkpoint(run.folder, warn=warn)
    if checkpoint is None:
        raise CheckpointError(f"{run.folder}: there is no checkpoint to export")
    if read_checkpoint_stage(checkpoint)[0] != "forget":
        raise CheckpointError(f"{checkpoint}: nothing is forgotten yet at this step; resume the run first")
    parts = load_parts(run.recipe)
    name = "ema" if weights == "ema" and (checkpoint / "ema.safetensors").is_file() else "generator"
    load_network(parts.generator, checkpoint / f"{name}.safetensors")
    metrics = io_safe.read_json(run.folder / METRICS) if (run.folder / METRICS).is_file() else {}
    judged = weights == "ema" and metrics.get("step") == verify_checkpoint(checkpoint)["step"]  # these very weights
    with torch.no_grad():
        return export_run_folder(parts.generator, run.recipe, parts, run.folder, target, metrics if judged else None)


def _is_export(folder: Path) -> bool:
    card = folder / "model.json"
    return card.is_file() and io_safe.read_json(card).get("kind") == "one-step generator"
