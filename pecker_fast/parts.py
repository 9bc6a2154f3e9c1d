"""Everything a recipe names, loaded and checked against each other before anything is written."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pecker_fast import io_safe
from pecker_fast.conditions import Conditions, class_conditions
from pecker_fast.config import Recipe
from pecker_fast.denoiser import Denoiser, load_denoiser, load_unet
from pecker_fast.engine.graph import require_gpu
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate.judge import Judge, Reference, load_judge


@dataclass
class Parts:
    """What a run starts from. `generator` and `score` are trainable copies, the teacher is frozen."""

    folder: Path
    teacher: Denoiser
    score: Denoiser
    generator: Denoiser
    conditions: Conditions
    judge: Judge | None
    reference: Reference | None
    teacher_sha256: str  # of the weights of φ, in named_parameters order
    base_sha256: str  # of φ, θ and ψ together: what the run starts from


def load_parts(recipe: Recipe) -> Parts:
    """Load model, start of θ and ψ, judge and conditions on the CPU. Raises RecipeError or ModelError, one line."""
    require_gpu(recipe, pick_device())
    folder = io_safe.resolve_model(recipe.model)
    judge, reference = find_judge(recipe, folder)
    teacher = load_denoiser(folder).freeze()
    if judge is not None:
        _match_judge(teacher, judge, folder)
    conditions = class_conditions(recipe.forget, recipe.cover, recipe.retain, teacher.classes)
    check_schedule(recipe, teacher)
    generator, score = load_start(recipe.generator, teacher) if recipe.generator else (teacher.clone(), teacher.clone())
    for network in (teacher, generator, score):
        network.channels_last = recipe.engine.channels_last
    networks = (("teacher", teacher), ("generator", generator), ("score", score))
    tensors = ((f"{name}.{key}", p) for name, network in networks for key, p in network.named_parameters())
    return Parts(
        folder, teacher, score, generator, conditions, judge, reference,
        io_safe.sha256_tensors(teacher.named_parameters()), io_safe.sha256_tensors(tensors),
    )  # fmt: skip


def find_judge(recipe: Recipe, folder: Path) -> tuple[Judge | None, Reference | None]:
    """The recipe's judge, else the one beside the model, else none (the run is then not judged)."""
    if recipe.evaluate.judge is not None:
        return load_judge(recipe.evaluate.judge)
    return load_judge(folder / "judge") if (folder / "judge").is_dir() else (None, None)


def load_start(name: str, teacher: Denoiser) -> tuple[Denoiser, Denoiser]:
    """(θ, ψ) of a distilled generator: its `generator/` and `score/`, or a pipeline's `unet/`; ψ from φ where it has none."""
    folder = io_safe.resolve_model(name)
    source = folder / "generator" if (folder / "generator").is_dir() else io_safe.check_model_folder(folder)
    generator = Denoiser(load_unet(source), teacher.schedule, teacher.null_class)
    _match_teacher(generator, teacher, source)
    if not (folder / "score").is_dir():
        return generator, teacher.clone()
    score = Denoiser(load_unet(folder / "score"), teacher.schedule, teacher.null_class)
    _match_teacher(score, teacher, folder / "score")
    return generator, score


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
                raise RecipeError(f"guidance.{key}: {value:g} needs a model with a null class; use 1")
        if recipe.guidance.text_dropout > 0:
            raise RecipeError("guidance.text_dropout: needs a model with a null class; use 0")


def _match_teacher(network: Denoiser, teacher: Denoiser, where: Path) -> None:
    theirs = {name: p.shape for name, p in network.named_parameters()}
    for name, p in teacher.named_parameters():
        if theirs.get(name) != p.shape:
            raise ModelError(
                f"{where}: tensor {name} has shape {theirs.get(name)}, the teacher's has {tuple(p.shape)}; another model's"
            )


def _match_judge(teacher: Denoiser, judge: Judge, folder: Path) -> None:
    """The judge tells how many classes are real: embeddings past them are the null class. Raises ModelError."""
    spare = teacher.num_class_embeds - judge.num_classes
    if spare == 1 and teacher.null_class is None:
        teacher.null_class = judge.num_classes
    judge.judge(torch.zeros(1, *teacher.sample_shape))  # raises where it was made for images of another size
    if len(teacher.classes) != judge.num_classes:
        raise ModelError(
            f"{folder}: the model has {len(teacher.classes)} classes and its judge {judge.num_classes}; give evaluate.judge"
        )


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
