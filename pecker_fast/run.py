"""The verbs of the library: train a recipe, unlearn from Python, distil a one-step generator."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from pecker_fast.config import Recipe, load_recipe, recipe_from
from pecker_fast.export import write_unet
from pecker_fast.guard import StopFlag
from pecker_fast.methods import get_method
from pecker_fast.parts import Parts, load_parts
from pecker_fast.run_folder import BASE, open_run_folder
from pecker_fast.saliency import ForgetImages
from pecker_fast.track import Tracker
from pecker_fast.training import RunResult, Training

__all__ = ["RunResult", "distill", "train", "unlearn"]


def train(recipe: Recipe, *, tensorboard: bool = False, quiet: bool = False, dry_run: bool = False) -> RunResult:
    """Run a recipe in its output folder, from where it stopped (`resume`). Raises PeckerError with nothing lost.

    dry_run loads and checks everything, and writes nothing.
    """
    started = time.perf_counter()
    get_method(recipe.method)
    parts = load_parts(recipe)
    forget_images = _forget_images(recipe, parts)
    if dry_run:
        return RunResult(Path(recipe.output), None, None)
    checkpoint = open_run_folder(recipe)
    with Tracker(recipe.output, tensorboard, "none" if quiet else "auto") as tracker, StopFlag() as stop:
        return Training(recipe, parts, tracker, stop, forget_images, started).run(checkpoint)


def unlearn(
    model: Any,
    forget: int | list[int],
    cover: int | list[int],
    retain: list[int] | None = None,
    method: str = "pecker",
    output: str | Path = "runs/unlearn",
    recipe: str | Path | Recipe | None = None,
    quiet: bool = True,
    **keys: Any,
) -> RunResult:
    """Make a class-conditional diffusion model forget classes, from Python.

    model: shipped name, diffusers folder, hub name, or an object with `.unet` and `.scheduler` (a diffusers pipeline).
    recipe: what the other settings come from (name, file or Recipe); keys: recipe keys, sections as dicts.
    Raises PeckerError subclasses, one line each.
    """
    if not isinstance(model, str | Path):
        model = _write_base(model, Path(output) / BASE)
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    given = {
        "model": str(model),
        "forget": forget,
        "cover": cover,
        "retain": retain,
        "method": method,
        "output": str(output),
        **keys,
    }
    data = base.model_dump(by_alias=True)
    for key, value in given.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return train(recipe_from(data, "unlearn"), quiet=quiet)


def distill(
    folder: Path,
    *,
    steps: int,
    seed: int,
    keys: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    quiet: bool = False,
) -> None:
    """Put a distilled one-step generator beside the teacher: `generator/` (averaged θ) and `score/` (ψ), all classes.

    keys: further recipe keys (lr, ema, ...); dtype: what the weights are stored as.
    """
    run_dir = folder / ".distill"
    given = {
        "model": str(folder),
        "method": "sfd",
        "steps": 0,
        "distill_steps": steps,
        "seed": seed,
        "output": str(run_dir),
    }
    recipe = recipe_from({**given, "evaluate": {"every": 0, "final": 0}, **(keys or {})}, "distill")
    parts = load_parts(recipe)
    checkpoint = open_run_folder(recipe)
    with Tracker(run_dir, console="none" if quiet else "auto") as tracker, StopFlag() as stop:
        training = Training(recipe, parts, tracker, stop, None, time.perf_counter())
        state = training.distilled(checkpoint)
    for name, network in (("generator", state.averaged_generator()), ("score", state.score)):
        write_unet(network, folder / name, dtype)
    shutil.rmtree(run_dir)


def _forget_images(recipe: Recipe, parts: Parts) -> ForgetImages | None:
    """`mask.data=PATH`: the user's own images of the forget class, dealt in order; no other data set is ever opened."""
    if not recipe.uses_mask or recipe.mask.source != "saliency" or recipe.mask.data in ("pseudo", "teacher"):
        return None
    from pecker_fast.data import forget_images

    return forget_images(recipe.mask.data, parts.teacher.sample_shape, parts.conditions.forget)


def _write_base(model: Any, folder: Path) -> Path:
    """An in-memory pipeline (or anything with `.unet` and `.scheduler`) as a model folder."""
    model.unet.save_pretrained(folder / "unet", safe_serialization=True)
    model.scheduler.save_pretrained(folder / "scheduler")
    return folder
