"""Pretraining: from a data set to a model folder with teacher, schedule, judge and perhaps a one-step generator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import draws, files
from pecker_fast.account.memory import Prediction
from pecker_fast.data import Dataset
from pecker_fast.data import datasets as data_sets
from pecker_fast.errors import RecipeError, memory_errors
from pecker_fast.pretrain import memory, taken
from pecker_fast.pretrain import output as folders
from pecker_fast.pretrain.fit import resumable
from pecker_fast.pretrain.judge import check_fit, first, second, train_judge
from pecker_fast.pretrain.progress import say_classes
from pecker_fast.pretrain.rounds import distil
from pecker_fast.pretrain.settings import SETTINGS, Settings, fitted, options, settings_for, unet_config
from pecker_fast.pretrain.teacher import train_unet
from pecker_fast.pretrain.without import Without, missing_classes, option
from pecker_fast.terminal import say

__all__ = ["SETTINGS", "Settings", "measure", "pretrain", "settings_for", "unet_config"]


@memory_errors(memory.LIGHTER)
def pretrain(
    name: str,
    data: str | Path | None = None,
    output: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    distill_steps: int | None = None,
    *,
    size: int | None = None,
    settings: Settings | None = None,
    batch_size: int | None = None,
    channels: tuple[int, ...] | None = None,
    without: Without = (),
    parts_of: str | Path | None = None,
) -> Path:
    """Train a class-conditional teacher and its judge, and write them as a model folder.

    name: "digits", "cifar10", "stl10" or "images"; "shapes" makes a text-to-image pipeline instead, see
        `pecker_fast.pretrain.shapes`.
    data: path of the data set, see `pecker_fast.data.datasets`; the digits need none.
    output: folder to write, new or empty; None = `runs/pretrain-NAME`. A folder in which the same command was
        interrupted is continued from its last saved step.
    steps: training steps of the teacher; None = the name's own.
    distill_steps: steps of distilling a one-step generator beside the teacher, 0 = none; None = the name's own.
    size: pixels that an image folder is resized to.
    settings: replaces the name's own settings.
    batch_size: images of a training step. channels: of each level of the teacher's UNet. None = the name's own; of an image
        folder as its number of images and their size allow, see `settings.fitted`.

    without: classes, by number or name, or words of shapes, that teacher and generator never get to see. The network keeps their
        embeddings, and the judges know them.
    parts_of: finished model whose judges (and VAE) are taken over: its folder, or a shipped name.

    Returns the folder. Raises `DataError`, `ModelError`, `OutputError`, `RecipeError`, `CheckpointError` and, after a signal,
    `Interrupted`.
    """
    if name == "shapes":
        from pecker_fast.pretrain.shapes import pretrain_shapes

        if data is not None or size is not None or settings is not None:
            raise RecipeError("shapes: it draws its own pictures; leave out data, size and settings")
        return pretrain_shapes(
            output,
            steps,
            seed,
            distill_steps,
            batch_size=batch_size,
            channels=channels,
            without=without,
            parts_of=parts_of,
        )
    given = {"steps": steps, "batch_size": batch_size, "channels": channels}
    fixed = frozenset(key for key, value in given.items() if value is not None)
    fits = name == "images" and settings is None
    settings = settings_for(name, steps, batch_size, channels) if settings is None else settings
    distill_steps = settings.distill_steps if distill_steps is None else distill_steps
    for key, value, least in (("steps", settings.steps, 1), ("seed", seed, 0), ("distill_steps", distill_steps, 0)):
        if value < least:
            raise RecipeError(f"{key}: {value} is too small, at least {least} expected")
        if value >= 1 << 63:
            raise RecipeError(f"{key}: {value} is too large, less than 2^63 expected")
    folder = Path(output) if output is not None else Path("runs") / f"pretrain-{name}"
    with folders.claimed(folder):
        begun = time.monotonic()
        dataset = data_sets.open_data(name, data, size=size)
        if dataset.class_names:
            say_classes(dataset.class_names)
        if fits:
            settings = fitted(settings, len(dataset), dataset.sample_size, fixed)

        def config_of(settings: Settings) -> dict[str, Any]:
            return unet_config(settings, dataset.channels, dataset.sample_size, dataset.num_classes)

        prediction = memory.check(config_of, settings, dataset.images.nbytes)
        if fits or prediction is not None:
            _tell(dataset, settings, config_of(settings), prediction)
        missing = missing_classes(without, dataset)
        others = None if parts_of is None else taken.parts_of(parts_of, taken.JUDGES)
        if others:
            for part in others.sha256:
                check_fit(others.folder / part, dataset)
        identity: dict[str, Any] = {
            "name": name, "seed": seed, "settings": _plain(asdict(settings)), "data_sha256": dataset.sha256()
        }  # fmt: skip
        identity |= {"without": list(missing)} if missing else {}
        identity |= {"parts_of": others.told()} if others else {}
        command = _command(name, settings, seed, distill_steps, data is not None, size) + options(batch_size, channels)
        command += option(missing) + (others.option() if others else "")
        if not folders.claim_for(folder, identity, command):
            if others:
                others.copy_to(folder)
            card = _card(identity, command, dataset)
            _make(folder, dataset, settings, config_of(settings), distill_steps, card, begun)
        folders.finish(folder)
    return folder


def _card(identity: dict[str, Any], command: str, dataset: Dataset) -> dict[str, Any]:
    """model.json of the teacher, without its figures."""
    seen = dataset.without(identity.get("without", ()))
    card: dict[str, Any] = {
        "name": identity["name"],
        "kind": "teacher",
        "null_class": dataset.num_classes,
        "num_classes": dataset.num_classes,
        "command": command,
        "seed": identity["seed"],
        "settings": identity["settings"],
        **{key: identity[key] for key in ("without", "parts_of") if key in identity},
        "data": {"images": len(seen), "split": seen.split, "sha256": seen.sha256()},
        "versions": _versions(),
    }
    if dataset.class_names:
        card["class_names"] = list(dataset.class_names)
    return card


def _make(
    folder: Path, dataset: Dataset, settings: Settings, config: dict[str, Any], distill_steps: int, card: dict[str, Any],
    begun: float,
) -> None:  # fmt: skip
    """Train and write all parts of the model, or go on with them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed = card["seed"]
    missing = card.get("without", [])
    resumed_from = _teacher(folder, dataset.without(missing), settings, config, seed, device)
    judges = {
        plan.part: train_judge(folder, dataset, settings, plan, device)
        for plan in (first(settings, seed), second(settings, seed))
    }
    files.write_json(folder / folders.MODEL, card)
    if distill_steps:
        distil(folder, [settings.distill], distill_steps, seed, getattr(torch, settings.storage), missing)
        card = files.read_json(folder / folders.MODEL) | card
    figures = {**judges, **measure(folder, settings, seed, missing)}
    card |= {"figures": figures, "time_s": round(time.monotonic() - begun, 1), "resumed_from": resumed_from}
    files.write_json(folder / folders.MODEL, card)


def _teacher(
    folder: Path, dataset: Dataset, settings: Settings, config: dict[str, Any], seed: int, device: torch.device
) -> int | None:
    """Train the UNet, or go on training it, and write it. Returns the step an interrupted run was taken up from."""
    from diffusers import UNet2DModel

    from pecker_fast.export import write_unet
    from pecker_fast.networks import Denoiser, load_schedule

    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(seed, "init").initial_seed())
        unet: Any = UNet2DModel(**config)
    unet = unet.to(device=device, memory_format=torch.channels_last)
    folders.write_scheduler(folder)
    state, save, resumed_from = resumable(folder, folders.TEACHER, unet, settings)
    schedule = load_schedule(folder / "scheduler")
    train_unet(state, schedule, dataset, settings, seed, save)
    write_unet(Denoiser(unet, schedule, dataset.num_classes), folder / "unet", getattr(torch, settings.storage))
    folders.write_index(folder)
    return resumed_from


def _tell(dataset: Dataset, settings: Settings, config: dict[str, Any], prediction: Prediction | None) -> None:
    """What will be trained, on standard error, where data decide it."""
    widths = ", ".join(map(str, config["block_out_channels"]))
    size = f"{dataset.sample_size}×{dataset.sample_size}"
    line = f"{len(dataset)} images of {size}: {settings.steps} steps in batches of {settings.batch_size}, channels {widths}"
    needs = f"; about {prediction.table()[-1][1]} of memory" if prediction is not None else ""
    say(line + needs)


def measure(folder: Path, settings: Settings, seed: int, without: Sequence[int] = ()) -> dict[str, Any]:
    """How good the stored teacher is: its DDIM samples, conditioned on all classes in turn, before the stored judge.

    `teacher_accuracy`: share judged as conditioned. `teacher_fid`: against all reference features. `fid_floor`: real
    against real, halves. `one_step_accuracy`, `one_step_fid`: the same of the distilled generator, where there is one.
    A FID is None where there are too few samples. All of it leaves the classes `without` out; `asked_for`: what is seen where
    they are asked for.
    """
    from pecker_fast.evaluate import disagreement, fid, fid_floor, load_judge, load_second_judge
    from pecker_fast.forgetting import ddim_sample, one_step_sample
    from pecker_fast.networks import Denoiser, load_denoiser, load_unet
    from pecker_fast.recipe import Recipe

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_denoiser(folder).to(device)
    classes = torch.tensor([c for c in teacher.classes if c not in without])
    labels = classes[torch.arange(settings.samples) % len(classes)]
    judge, reference = load_judge(folder / "judge")
    second = load_second_judge(folder)
    assert reference is not None, "the judge was written without reference features"
    reference = reference.select(classes.tolist()) if without else reference
    real = reference.features

    def judged(who: str, images: Tensor) -> dict[str, Any]:
        features, logits = judge.judge(images.cpu())
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        found = {f"{who}_accuracy": accuracy, f"{who}_fid": fid(real, features) if len(labels) > 1 else None}
        return (
            found if second is None else found | {f"{who}_disagreement": disagreement(judge, second, images)["class"]}
        )

    def seen(images: Tensor) -> dict[str, float]:
        shares = judge.judge(images.cpu())[1].argmax(1).bincount(minlength=judge.num_classes).double() / len(images)
        return {str(c): share for c, share in enumerate(shares.tolist())}

    asked = {c: torch.full((max(1, settings.samples // 4),), c) for c in without}
    drawn = {
        str(c): {"teacher": seen(ddim_sample(teacher, rows, settings.sampler_steps, seed))} for c, rows in asked.items()
    }
    figures = judged("teacher", ddim_sample(teacher, labels, settings.sampler_steps, seed))
    if (folder / "generator").is_dir():
        generator = Denoiser(load_unet(folder / "generator"), teacher.schedule, teacher.null_class).to(device)
        t_init = Recipe().timesteps.init
        figures |= judged("one_step", one_step_sample(generator, labels, seed, t_init))
        for c, rows in asked.items():
            drawn[str(c)]["one step"] = seen(one_step_sample(generator, rows, seed, t_init))
    return (
        figures
        | ({"asked_for": drawn} if without else {})
        | {
            "samples": len(labels),
            "sampler": f"DDIM, {settings.sampler_steps} steps",
            "fid_floor": fid_floor(real, reference.labels, seed) if len(real) > 3 else None,
            "reference_samples": len(real),
        }
    )


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}


def _command(name: str, settings: Settings, seed: int, distill_steps: int, has_data: bool, size: int | None) -> str:
    words = ["pecker-fast", "pretrain", name, *(["--data", "PATH"] if has_data else [])]
    words += ["--steps", str(settings.steps), "--seed", str(seed), "--distill-steps", str(distill_steps)]
    return " ".join(words + (["--size", str(size)] if size is not None else []))


def _versions() -> dict[str, str]:
    import diffusers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}
