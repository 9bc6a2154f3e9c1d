"""The verbs over a finished run: draw from it, judge it again, export it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pecker_fast import files
from pecker_fast.conditions import short_range, shown_classes
from pecker_fast.engine import blend_average
from pecker_fast.errors import CheckpointError, ModelError, OutputError, RecipeError, memory_errors
from pecker_fast.evaluate import Sampler
from pecker_fast.export import FORMATS, LoraForm, Result, apply_to_folder, export_file, export_folder
from pecker_fast.forgetting import grid_labels, save_grid
from pecker_fast.loading import Model, start_generator, start_student
from pecker_fast.networks import MANY_STEPS, ONE_STEP, AdaptedUNet, Denoiser, TextDenoiser
from pecker_fast.records import (
    PIPELINE,
    generator_tensors,
    known_base,
    latest_checkpoint,
    locked,
    read_checkpoint_stage,
    read_manifest,
    sound_metrics,
    sweep_run_folder,
    trajectory_sha256,
)
from pecker_fast.runs.held import (
    BASE_KEYS,
    Run,
    base_model,
    held_model,
    judge_of,
    load_run,
    trained_generator,
)
from pecker_fast.runs.judging import EVALUATION_SEED
from pecker_fast.runs.prompt_judging import grid_rows, judging_of
from pecker_fast.terminal import note, warn

__all__ = [
    "apply_delta_file",
    "evaluate_run",
    "export_run",
    "load_run",
    "sample_run",
    "trained_generator",
]


@memory_errors("draw fewer images (count), or free memory")
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

    classes: None = all the model can draw, or of very many those of the run's own grids.
    prompts: of a text-to-image run; None = the grid of its own prompts.
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
    name = f"{'before' if before else 'sample'}-seed{seed}.png"
    target = files.check_picture(output or run.folder / "samples" / name)
    model, generator = drawing(run, before, prompts or ())
    tell_cut(model, prompts or ())
    wanted = _wanted(model, classes, prompts)
    images = judging_of(run.recipe, model).of(generator)(grid_labels(wanted, count), seed)
    return save_grid(images, count, target)


def drawing(run: Run, before: bool, prompts: Sequence[str], judge: str | None = None) -> tuple[Model, Denoiser]:
    """(the rest of the model, what draws): the run's result, or what θ started as."""
    if not before:
        model = held_model(run, prompts, judge)
        return model, model.teacher
    model = base_model(run, prompts)
    return model, start_generator(run.located(BASE_KEYS), model.teacher).freeze()


def tell_cut(model: Model, prompts: Sequence[str]) -> None:
    """Which of the prompts asked for are longer than the model reads."""
    if model.text is not None:
        note(model.text.window.notes(prompts))


def _wanted(model: Model, classes: Sequence[int] | None, prompts: Sequence[str] | None) -> list[int]:
    """Conditions to draw, a row each."""
    teacher = model.teacher
    if isinstance(teacher, TextDenoiser) and model.text is not None:
        if prompts is not None:
            return list(teacher.table.index(prompts))
        return [row for row, _ in grid_rows(model.text.judged, teacher.table)]
    conditions = model.conditions
    if not classes:
        return shown_classes(conditions.forget, conditions.cover, teacher.classes)
    for c in classes:
        if c not in teacher.classes:
            raise RecipeError(f"classes: {c} is out of range; the model's classes are {short_range(teacher.classes)}")
    return list(classes)


@memory_errors("judge fewer samples, or free memory")
def evaluate_run(
    run_dir: str | Path,
    samples: int | None = None,
    seed: int | None = None,
    judge: str | Path | None = None,
    everything: bool = False,
) -> dict[str, Any]:
    """Judge the exported generator again: {"before", "after", "teacher"}, all by the same judge, samples and seed.

    `before` and `teacher` are taken from the run where they were made so, else None, with the reason under "blank";
    everything: they are drawn again, as far as there is something to draw from.
    """
    run = load_run(run_dir)
    recipe, other = run.recipe, judge is not None and str(judge) != run.recipe.evaluate.judge
    folder = str(judge) if judge is not None else judge_of(run)
    parts = base_model(run, judge=folder) if everything else held_model(run, judge=folder)
    judging = judging_of(recipe, parts)
    asked = {"samples": samples or recipe.evaluate.final or 2000, "seed": EVALUATION_SEED if seed is None else seed}

    def drawn(sampler: Sampler) -> dict[str, Any]:
        return judging.figures(sampler, **asked)

    recorded = sound_metrics(run.folder, trajectory_sha256(recipe))
    found: dict[str, Any] = {"before": None, "after": drawn(judging.of(trained_generator(run, parts)))}
    blank: dict[str, str] = {}
    for name in ("before", "teacher"):
        row = recorded.get(name)
        if everything and name == "teacher":
            try:
                found[name] = drawn(judging.multi_step())
            except ModelError as error:
                found[name], blank[name] = None, str(error)
        elif everything and not recipe.distill_steps:
            found[name] = drawn(judging.of(start_generator(run.located(BASE_KEYS), parts.teacher).freeze()))
        elif row and not other and asked == {"samples": row["samples"], "seed": row.get("seed", EVALUATION_SEED)}:
            found[name] = row
        else:
            found[name], blank[name] = None, _why_blank(row, other, everything)
    steps = recorded.get("forget_steps", recipe.steps)
    return found | {"blank": blank, "forget_steps": steps, "judge": judging.trust(found["teacher"])}


def _why_blank(row: dict[str, Any] | None, other_judge: bool, everything: bool) -> str:
    if everything:
        return "the run distilled its own start, which is not kept"
    if not row:
        return "not judged in the run; --all draws it"
    if other_judge:
        return "the run had another judge; --all draws it again"
    seed = row.get("seed", EVALUATION_SEED)
    return f"the run has it of {row['samples']} samples with seed {seed}; --all draws it again"


@memory_errors("an export holds the model in memory, free some")
def export_run(
    run_dir: str | Path, output: str | Path | None = None, weights: str = "ema", form: str = "diffusers",
    rank: int = 32, names: str = "diffusers",
) -> Path:  # fmt: skip
    """Write the model of the newest checkpoint; weights: "ema" (the average) or "raw"; form: one of `FORMATS`. rank, names: of a
    LoRA file, see `write_lora`."""
    run, lora = load_run(run_dir), LoraForm(rank, names)
    if weights not in ("ema", "raw"):
        raise RecipeError(f"weights: {weights!r}; give ema or raw")
    if form not in FORMATS:
        raise RecipeError(f"format: {form!r}; give one of {', '.join(FORMATS)}")
    name = "pipeline" if form == "diffusers" else f"{form}.safetensors"
    target = Path(output) if output else run.folder / name
    if weights == "raw" and output is None:
        raise RecipeError("weights: raw weights do not replace the run's own; give --output")
    if output is None:
        with locked(run.folder):
            sweep_run_folder(run.folder)
            return _export(run, target, weights, form, lora)
    return _export(run, target, weights, form, lora)


def _export(run: Run, target: Path, weights: str, form: str, lora: LoraForm) -> Path:
    if form == "diffusers" and target.exists() and target != run.folder / PIPELINE and not _is_export(target):
        raise OutputError(f"{target}: exists and is no exported generator; give another output")
    recipe_sha256 = trajectory_sha256(run.recipe)
    checkpoint = latest_checkpoint(run.folder, warn, {"recipe_sha256": recipe_sha256}, run.recipe.distill_steps)
    if checkpoint is None:
        raise CheckpointError(f"{run.folder}: there is no checkpoint to export")
    if read_checkpoint_stage(checkpoint)[0] != "forget":
        raise CheckpointError(f"{checkpoint}: nothing is forgotten yet at this step; resume the run first")
    model, base_sha256 = _exported_from(run, form)
    generator = checkpointed_generator(run, model, checkpoint, averaged=weights == "ema" and run.recipe.ema > 0)
    if form != "lora":
        generator = generator.without_adapters()
    metrics = sound_metrics(run.folder, recipe_sha256)
    judged = weights == "ema" and metrics.get("step") == read_manifest(checkpoint)["step"]  # these very weights
    facts = Result(generator, run.recipe, model, base_sha256, metrics if judged else None)
    if form != "diffusers":
        return export_file(facts, target, form, lora, lambda line: note([line]))
    return export_folder(facts, run.folder, target)


def _exported_from(run: Run, form: str) -> tuple[Model, str]:
    """The base model and its `base_sha256`; where it is gone, what the run holds of it in `pipeline/` serves all but a delta and
    a LoRA."""
    try:
        model = base_model(run)
        return model, known_base(run.folder, run.inputs) or files.hash_of(model.base_unet())
    except ModelError as reason:
        if form in ("delta", "lora") or run.recipe.student == "lora" or not (run.folder / PIPELINE).is_dir():
            raise
        warn(f"{reason}; what the export needs of it is taken from {run.folder / PIPELINE}")
    model = held_model(run)
    base = known_base(run.folder, run.inputs)
    return model, base if base is not None else files.read_object(run.pipeline / "model.json")["base_sha256"]


def checkpointed_generator(run: Run, model: Model, checkpoint: Path, averaged: bool) -> Denoiser:
    """θ of a checkpoint, its average or its raw weights."""
    if run.recipe.student == "lora":
        generator = start_student(run.located(BASE_KEYS), model.teacher)
        mask = read_checkpoint_stage(checkpoint)[1]
        if mask is not None:
            cast(AdaptedUNet, generator.unet).restrict(mask.bool)
    else:
        generator = model.teacher.clone()
    shapes = {name: p.shape for name, p in generator.named_parameters()}
    generator.load_state(generator_tensors(checkpoint, shapes, "weights"), checkpoint)
    if averaged:
        blend_average(generator, generator_tensors(checkpoint, shapes, "ema"))
    return generator.freeze()


@memory_errors("base and result are held in memory, free some")
def apply_delta_file(delta: str | Path, base: str, output: str | Path) -> Path:
    """Base + delta = result: a diffusers folder for a folder, a single file for a single file. See `delta.apply_to_folder`."""
    return apply_to_folder(Path(delta), files.resolve_model(base), Path(output))


def _is_export(folder: Path) -> bool:
    card = folder / "model.json"
    found = files.read_json(card) if card.is_file() else None
    return isinstance(found, dict) and found.get("kind") in (ONE_STEP, MANY_STEPS)
