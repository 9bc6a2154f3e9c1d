"""Everything a recipe names, loaded and checked against each other before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pecker_fast import files
from pecker_fast.conditions import Conditions, class_conditions
from pecker_fast.engine import require_gpu
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate import Judge, Reference, WordJudge, load_judge, load_word_judge
from pecker_fast.forgetting import check_method
from pecker_fast.loading.checks import (
    check_norms,
    check_schedule,
    check_source,
    fit_timesteps,
    look_at_hub,
    timesteps_note,
)
from pecker_fast.loading.exported import check_exported
from pecker_fast.loading.text_parts import TextParts, load_text_parts
from pecker_fast.networks import (
    Denoiser,
    TextDenoiser,
    check_said,
    fuse_norms,
    load_denoiser,
    load_unet,
    with_adapters,
)
from pecker_fast.recipe import Recipe

_UNUSED = ("dropout", "sample_size")  # dropout is off, and of the size what a network says is compared


@dataclass(kw_only=True)
class Model:
    """The teacher of a recipe with all that belongs to it; nothing is trained yet."""

    folder: Path  # or the single file
    teacher: Denoiser  # φ, frozen
    conditions: Conditions
    judge: Judge | None = None  # of classes
    reference: Reference | None = None
    text: TextParts | None = None  # of a text-to-image model
    words: WordJudge | None = None  # its judge
    notes: tuple[str, ...] = ()  # what the user should know of it, a line each

    @property
    def configs(self) -> Path:
        """The folder of its configs, of a single file the one that was given for it."""
        return self.folder if self.text is None else self.text.configs

    def base_unet(self) -> dict[str, Tensor]:
        """The UNet's tensors as the model's file has them, by diffusers' names."""
        return (
            self.text.base_unet()
            if self.text is not None
            else files.read_weights(files.check_model_folder(self.folder))
        )


@dataclass(kw_only=True)
class Parts(Model):
    """What a run starts from. `generator` and `score` are trainable copies; None of methods without ψ."""

    score: Denoiser | None
    generator: Denoiser
    base_sha256: str  # of the model's UNet as its file has it, see `files.hash_of`
    start_sha256: str  # of φ, θ and ψ together, and of the prompts: what the run starts from


def load_parts(recipe: Recipe) -> Parts:
    """Load model, start of θ and ψ, judge and conditions on the CPU. Raises RecipeError or ModelError, one line."""
    require_gpu(recipe, pick_device())
    check_method(recipe)
    model = load_model(recipe)
    if model.text is not None:
        model.text.check_prompts()  # of training alone: a run that was made before can still be looked at
    teacher = model.teacher
    generator, score = load_start(recipe, teacher)
    if recipe.engine.checkpointing:
        for network in (teacher, generator, *([] if score is None else [score])):
            enable_checkpointing(network.unet)
    return Parts(
        **vars(model), score=score, generator=generator,
        base_sha256=files.hash_of(model.base_unet()), start_sha256=_start_sha256(model, generator, score),
    )  # fmt: skip


def start_of(recipe: Recipe, model: Model) -> str:
    """`start_sha256` of a run of this recipe on this model. Raises ModelError."""
    return _start_sha256(model, *load_start(recipe, model.teacher))


def _start_sha256(model: Model, generator: Denoiser, score: Denoiser | None) -> str:
    networks = [("teacher", model.teacher), ("generator", generator), *([] if score is None else [("score", score)])]
    tensors: list[tuple[str, Tensor]] = [
        (f"{name}.{key}", p)
        for name, network in networks
        for key, p in (*network.named_parameters(), *_base(network, model))
    ]
    return files.sha256_tensors([*tensors, *prompts_of(model)])


def _base(network: Denoiser, model: Model) -> list[tuple[str, Tensor]]:
    """What adapters stand on, where that is not φ."""
    base = getattr(network.unet, "base", model.teacher.unet)
    return [] if base is model.teacher.unet else [(f"base.{key}", p) for key, p in network.whole_parameters()]


def prompts_of(model: Model) -> list[tuple[str, Tensor]]:
    """What the prompts of a text-to-image run came to: a run is not resumed with others."""
    if not isinstance(model.teacher, TextDenoiser):
        return []
    c = model.conditions
    rows = [(name, torch.tensor(getattr(c, name))) for name in ("forget", "cover", "retain")]
    return [("embeds", model.teacher.table.embeds), *rows]


@files.guarded("model", "cannot be loaded")
def load_model(recipe: Recipe, prompts: Sequence[str] = (), result: bool = False) -> Model:
    """The teacher, conditions and judge of a recipe, on the CPU. prompts: more rows for a text-to-image model's table.

    result: the model is a run's own export, to be drawn from; a teacher must be none.

    Raises RecipeError or ModelError, one line.
    """
    check_norms(recipe, pick_device())
    if files.is_hub_name(recipe.model):
        look_at_hub(recipe)  # refused before its weights are fetched
    folder = files.resolve_model(recipe.model, recipe.revision)
    check_source(recipe, folder, result)
    model: Model
    if recipe.uses_prompts:
        teacher, conditions, text = load_text_parts(recipe, folder, prompts)
        model = Model(folder=folder, teacher=teacher, conditions=conditions, text=text)
        model.words = find_word_judge(recipe, text.configs)
    else:
        judge, reference = find_judge(recipe, folder)
        denoiser = load_denoiser(folder, recipe.null_class, result).freeze()
        denoiser.channels_last = recipe.engine.channels_last
        if judge is not None:
            _match_judge(denoiser, judge, folder)
        conditions = class_conditions(recipe.forget, recipe.cover, recipe.retain, denoiser.classes)
        model = Model(folder=folder, teacher=denoiser, conditions=conditions, judge=judge, reference=reference)
    length = model.teacher.schedule.num_timesteps
    told: tuple[str | None, ...] = (*files.model_notes(folder), *_start_notes(recipe))
    if not result:  # a one-step result's schedule ends where it takes its step
        check_schedule(fit_timesteps(recipe, length), model.teacher)
        told = (*told, timesteps_note(recipe, length))
    model.notes = tuple(filter(None, (*told, null_class_note(model.teacher))))
    if recipe.engine.weights == "bf16":
        in_dtype(model.teacher.unet, torch.bfloat16)
    if recipe.engine.norms == "fused":
        fuse_norms(model.teacher.unet)
    return model


def enable_checkpointing(unet: nn.Module) -> None:
    """Blocks keep no activations and are computed again on the way back. Raises RecipeError where the network cannot."""
    network: Any = getattr(unet, "base", unet)
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise RecipeError(f"engine.checkpointing: {type(network).__name__} cannot; leave it out")
    # nothing in these networks draws, and a CUDA graph would not let the generator's state be read
    network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def find_word_judge(recipe: Recipe, folder: Path) -> WordJudge | None:
    """The recipe's judge of words, else the one beside the model, else none."""
    if recipe.evaluate.judge is not None:
        found = load_word_judge(recipe.evaluate.judge)
        if found is None:
            raise ModelError(
                f"{recipe.evaluate.judge}: this judge knows classes and no words; a text-to-image run needs words"
            )
        return found
    return load_word_judge(folder / "judge") if (folder / "judge").is_dir() else None


def find_judge(recipe: Recipe, folder: Path) -> tuple[Judge | None, Reference | None]:
    """The recipe's judge, else the one beside the model, else none (the run is then not judged)."""
    if recipe.evaluate.judge is not None:
        return load_judge(recipe.evaluate.judge)
    return load_judge(folder / "judge") if (folder / "judge").is_dir() else (None, None)


@files.guarded("generator", "cannot be loaded")
def load_start(recipe: Recipe, teacher: Denoiser) -> tuple[Denoiser, Denoiser | None]:
    """(θ, ψ): copies of φ, or those of the recipe's distilled generator: its `generator/` and `score/`, or a pipeline's
    `unet/`, with ψ from φ where it has none. With `score: lora` ψ is φ with an adapter. Methods that leave a model of many steps
    have no ψ."""
    generator = start_student(recipe, teacher)
    if not recipe.one_step:
        return generator, None
    folder = start_folder(recipe)
    if recipe.score == "lora" or folder is None or not (folder / "score").is_dir():
        return generator, new_score(recipe, teacher)
    return generator, _load_like(recipe, teacher, folder / "score")


def start_student(recipe: Recipe, teacher: Denoiser) -> Denoiser:
    """θ as it starts, trainable: with `student: lora` adapters on it, which share φ's weights where it starts as φ."""
    if recipe.student == "full":
        return start_generator(recipe, teacher)
    start = teacher if recipe.generator is None else start_generator(recipe, teacher)
    return with_adapters(start, recipe.lora.rank, recipe.lora.targets, recipe.seed)


def start_generator(recipe: Recipe, teacher: Denoiser) -> Denoiser:
    """θ as it starts, a network of its own."""
    folder = start_folder(recipe)
    if folder is None:
        return teacher.clone()
    if (folder / "generator").is_dir():
        return _load_like(recipe, teacher, folder / "generator")
    unet = files.check_model_folder(folder)
    check_exported(folder, "export it again, or give another generator", part="unet")
    return _load_like(recipe, teacher, unet)


def start_folder(recipe: Recipe) -> Path | None:
    """The folder of the recipe's distilled generator; None where it names none."""
    return None if recipe.generator is None else files.resolve_model(recipe.generator)


def _start_notes(recipe: Recipe) -> list[str]:
    """What is told of a distilled generator that lies in a folder of its own."""
    if recipe.generator is None or recipe.generator == recipe.model or files.is_hub_name(recipe.generator):
        return []
    return files.model_notes(files.resolve_model(recipe.generator))


def _load_like(recipe: Recipe, teacher: Denoiser, folder: Path) -> Denoiser:
    check_said(folder, teacher.schedule, "the teacher's scheduler")
    network = teacher.with_network(in_dtype(load_unet(folder), teacher.dtype))
    _match_teacher(network, teacher, folder)
    if recipe.engine.norms == "fused":
        fuse_norms(network.unet)
    return network


def in_dtype(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its weights kept in `dtype`."""
    # diffusers' own `to` speaks of modules to be kept in float32, which these networks have none of
    return unet if dtype == torch.float32 else nn.Module.to(unet, dtype)


def new_score(recipe: Recipe, teacher: Denoiser) -> Denoiser:
    """ψ as it starts: φ's weights of its own, or an adapter on φ's."""
    if recipe.score == "full":
        return teacher.clone()
    return with_adapters(teacher, recipe.lora.rank, recipe.lora.targets, recipe.seed)


def _match_teacher(network: Denoiser, teacher: Denoiser, where: Path) -> None:
    """Raises ModelError unless a network is built as the teacher is, and so computes the same of the same weights."""
    theirs, ours = ({name: tuple(p.shape) for name, p in n.named_parameters()} for n in (network, teacher))
    for name in (*ours, *theirs):
        if theirs.get(name) != ours.get(name):
            raise ModelError(
                f"{where}: tensor {name} has shape {theirs.get(name)}, the teacher's has {ours.get(name)}; another model's"
            )
    if network.sample_shape != teacher.sample_shape:
        raise ModelError(f"{where}: its samples are {network.sample_shape}, the teacher's {teacher.sample_shape}")
    for key, value in teacher.config.items():
        found = network.config.get(key)
        if not key.startswith("_") and key not in _UNUSED and _plain(found) != _plain(value):
            raise ModelError(
                f"{where}: {key} is {files.shown(found)}, the teacher's is {files.shown(value)}; another model's"
            )


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _match_judge(teacher: Denoiser, judge: Judge, folder: Path) -> None:
    """The judge tells how many classes are real: embeddings past them are the null class. Raises ModelError."""
    spare = teacher.num_class_embeds - judge.num_classes
    if spare == 1 and teacher.null_class is None:
        teacher.null_class = judge.num_classes
    try:
        judge.judge(torch.zeros(1, *teacher.sample_shape))
    except ModelError as error:  # it was made for images of another size
        raise ModelError(f"{folder}: {error}; give evaluate.judge") from None
    if len(teacher.classes) != judge.num_classes:
        raise ModelError(
            f"{folder}: the model has {len(teacher.classes)} classes and its judge {judge.num_classes}; give evaluate.judge"
        )
    if teacher.classes[-1] != judge.num_classes - 1:
        raise ModelError(
            f"{folder}: the judge numbers its classes 0 to {judge.num_classes - 1}, the model's null class is "
            f"{teacher.null_class} among them; give evaluate.judge, or another null_class"
        )


def null_class_note(teacher: Denoiser) -> str | None:
    """Told where the last of the embeddings looks like that of label dropout, and nobody has said so."""
    count = teacher.num_class_embeds if not isinstance(teacher, TextDenoiser) else 0
    if teacher.null_class is not None or count - 1 not in (10, 100, 200, 365, 1000):
        return None
    return (
        f"the model has {count} class embeddings and all are taken for classes; if the last is that of label dropout, give "
        f"null_class={count - 1}"
    )


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
