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
from pecker_fast.export import export_pipeline
from pecker_fast.judging import EVALUATION_SEED, Judging
from pecker_fast.parts import Parts, load_parts
from pecker_fast.run_folder import METRICS, PIPELINE, RECIPE, warn
from pecker_fast.sample import grid_labels, one_step_sample, save_grid


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


def trained_generator(run: Run, parts: Parts) -> Denoiser:
    """θ as exported in `pipeline/`."""
    if not (run.folder / PIPELINE).is_dir():
        raise OutputError(
            f"{run.folder}: the run has no {PIPELINE}/ yet; resume it, or `pecker-fast export` its last checkpoint"
        )
    return Denoiser(
        load_unet(run.folder / PIPELINE / "unet"), parts.teacher.schedule, parts.teacher.null_class
    ).freeze()


def sample_run(
    run_dir: str | Path,
    classes: Sequence[int] | None = None,
    count: int = 8,
    seed: int = 0,
    output: str | Path | None = None,
    before: bool = False,
) -> Path:
    """Draw `count` images of each class into one PNG grid, a class a row; before=True draws from what θ started as.

    classes: None = all the model can draw. Raises RecipeError for a class out of range. Returns the PNG's path.
    """
    run = load_run(run_dir)
    if count < 1:
        raise RecipeError(f"count: {count} images; give at least 1")
    if before and run.recipe.distill_steps:
        raise RecipeError("before: this run distilled its own start, which is not kept; see samples/before.png")
    parts = load_parts(run.recipe)
    wanted = list(classes) if classes else parts.teacher.classes
    for c in wanted:
        if c not in parts.teacher.classes:
            raise RecipeError(f"classes: {c} is out of range; the model's classes are {parts.teacher.classes}")
    generator = parts.generator if before else trained_generator(run, parts)
    images = one_step_sample(generator, grid_labels(wanted, count), seed, run.recipe.timesteps.init)
    name = f"{'before' if before else 'sample'}-seed{seed}.png"
    return save_grid(images, count, Path(output) if output else run.folder / "samples" / name)


def evaluate_run(
    run_dir: str | Path, samples: int | None = None, seed: int | None = None, judge: str | Path | None = None
) -> dict[str, Any]:
    """Judge the exported generator again: {"before", "after", "teacher"} with `after` new and the others as recorded."""
    run = load_run(run_dir)
    recipe = run.recipe
    if judge is not None:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"judge": str(judge)})})
    parts = load_parts(recipe)
    if parts.judge is None:
        raise RecipeError("evaluate: the model folder has no judge/; give --judge FOLDER")
    judging = Judging(recipe, parts)
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
    load_network(parts.generator.unet, checkpoint / f"{name}.safetensors")
    metrics = io_safe.read_json(run.folder / METRICS) if (run.folder / METRICS).is_file() else {}
    judged = weights == "ema" and metrics.get("step") == verify_checkpoint(checkpoint)["step"]  # these very weights
    with torch.no_grad():
        return export_pipeline(
            parts.generator, run.recipe, parts.conditions, target, base_sha256=parts.teacher_sha256,
            metrics=metrics if judged else None,
        )  # fmt: skip


def _is_export(folder: Path) -> bool:
    card = folder / "model.json"
    return card.is_file() and io_safe.read_json(card).get("kind") == "one-step generator"
