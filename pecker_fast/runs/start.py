"""The verbs of the library: train a recipe, unlearn from Python, distil a one-step generator."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pecker_fast.conditions import Conditions, Names, notes_of
from pecker_fast.engine.zero import check_recipe, require_deepspeed
from pecker_fast.errors import ModelError, OutputError, RecipeError, memory_errors
from pecker_fast.export import write_unet
from pecker_fast.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    discard,
    is_hub_name,
    read_json,
    revision_of,
    sha256_tensors,
    whole_folder,
    write_json,
    write_tensors,
)
from pecker_fast.forgetting import ForgetImages, check_exclude, check_method, check_start
from pecker_fast.loading import Parts, fit_timesteps, load_parts, look_at_hub, plan_of
from pecker_fast.machine import StopFlag
from pecker_fast.machine.ranks import ALONE, Ranks, joined
from pecker_fast.networks import TextDenoiser, load_unet
from pecker_fast.recipe import Recipe, for_method, load_recipe, methods, recipe_from, recipe_to_yaml
from pecker_fast.records import (
    BASE,
    NoTracker,
    Tracker,
    begun_with,
    is_ours,
    is_run_folder,
    locked,
    open_run_folder,
    plan_run_folder,
    require_tensorboard,
    take_inputs,
    trajectory_sha256,
)
from pecker_fast.runs.auditing import check_audit, with_audit
from pecker_fast.runs.forecast import check_memory, lighter, surely_fits
from pecker_fast.runs.own_images import own_images
from pecker_fast.runs.planning import found_rows, planned, prompt_rows, run_rows
from pecker_fast.runs.result import RunResult
from pecker_fast.runs.training import Training
from pecker_fast.terminal import note

__all__ = ["RunResult", "distill", "train", "unlearn"]


def train(
    recipe: Recipe,
    *,
    tensorboard: bool = False,
    quiet: bool = False,
    dry_run: bool = False,
    ranks: Ranks = ALONE,
    device: str | None = None,
) -> RunResult:
    """Run a recipe in its output folder, from where it stopped (`resume`). Raises PeckerError with nothing lost.

    dry_run loads and checks everything, and writes nothing; the result tells what was found. device: what a dry run plans
    for, see `device_of`; None = what runs here use. ranks: the processes a launcher has started, all of which call
    this with the same recipe (`ranks.launched`).
    """
    started = time.perf_counter()
    with ranks_of(recipe, ranks) as ranks, memory_errors(lighter(recipe)):
        check_ranks(recipe, ranks)
        ranks.agree(lambda: check_method(recipe))
        located = ranks.agree(lambda: begun_with(recipe))
        text, found = located.uses_prompts, []
        prediction = None if dry_run or not text or located.engine.zero else check_memory(located)
        if dry_run and text:
            found = ranks.first(lambda: planned(located, device)) or []
            if (prompts := dry_run_text(located)) is not None:
                return RunResult(Path(recipe.output), None, None, (*prompts, *found))
        parts = ranks.agree(lambda: load_parts(located))
        if parts.text is not None:
            told = parts.text.notes()
            ranks.first(lambda: note(told))
        length = parts.teacher.schedule.num_timesteps
        recipe, located = ranks.agree(lambda: (fit_timesteps(recipe, length), fit_timesteps(located, length)))
        if not text:  # small as a rule, and only looked at when the folder is known to be sound
            if dry_run:
                found = ranks.first(lambda: planned(located, device)) or []
            elif not located.engine.zero and not surely_fits(located):
                prediction = check_memory(located)
        if (commit := revision_of(parts.folder)) is not None:  # what a later resume is to find
            recipe, located = (one.model_copy(update={"revision": commit}) for one in (recipe, located))
        ranks.agree(lambda: check_audit(located, parts))
        forget_images = ranks.agree(lambda: _forget_images(located, parts))
        own = ranks.agree(lambda: own_images(located, parts, _class_names(parts.folder)))
        identity = identity_of(recipe, parts)
        alike(ranks, identity["start_sha256"], "model: the ranks have loaded different models")
        plan = ranks.told(lambda: plan_run_folder(recipe, identity))
        ranks.agree(lambda: check_exclude(located, parts.generator))
        if plan.checkpoint is None:  # a run that goes on has its mask
            ranks.agree(lambda: check_start(located, parts.teacher, parts.score))
        if tensorboard:
            ranks.agree(require_tensorboard)
        if dry_run:
            ranks.first(lambda: note(parts.notes))
            found = [*found_rows(recipe, parts), *run_rows(recipe, plan.checkpoint), *found]
            return RunResult(plan.run_dir, None, None, tuple(found))
        console = "none" if quiet else "auto"
        with ExitStack() as stack:
            ranks.first(lambda: stack.enter_context(locked(plan.run_dir)))
            stop = stack.enter_context(StopFlag(ranks))
            inputs = ranks.agree(lambda: take_inputs(recipe, located, plan.run_dir, parts, parts.base_sha256))
            ranks.first(lambda: open_run_folder(recipe, plan, inputs))
            tracker = ranks.first(lambda: Tracker(plan.run_dir, tensorboard, console)) or NoTracker()
            stack.enter_context(tracker)
            training = Training(located, parts, identity, tracker, stop, forget_images, started, ranks)
            training.prediction, training.written, training.own_images = prediction, recipe, own
            result = training.run(plan.checkpoint)
            del training
            return ranks.first(lambda: with_audit(located, parts, result, quiet)) or result


@contextmanager
def ranks_of(recipe: Recipe, ranks: Ranks) -> Iterator[Ranks]:
    """The processes of this run: those that were launched, or with engine.zero a world of this one alone.

    Raises RecipeError where more were launched than the recipe has use for.
    """
    if ranks.world > 1 and not recipe.engine.zero:
        raise ranks.shared(
            RecipeError(f"engine.zero: 0 is one process, but {ranks.world} were started; use engine.zero=1, 2 or 3")
        )
    if ranks.world == 1 and recipe.engine.zero:
        check_ranks(recipe, ALONE)  # before DeepSpeed is set up, which a process can do once
        check_method(recipe)
        with joined(recipe.engine.stall_s) as group:
            yield group
        return
    ranks.patience(recipe.engine.stall_s)
    yield ranks


def check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Raise RecipeError where the sharded engine cannot run this recipe, or the ranks were given different ones."""
    alike(ranks, recipe_to_yaml(recipe), "the ranks were started with different recipes")

    def check() -> None:
        if recipe.engine.zero:
            require_deepspeed()
            check_recipe(recipe, ranks.world)

    ranks.agree(check)


def alike(ranks: Ranks, value: str, what: str) -> None:
    """Raise RecipeError on every rank unless all have the same value. Takes all ranks."""
    values = ranks.everyones(hashlib.sha256(value.encode()).hexdigest())
    other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
    if other is not None:
        raise ranks.shared(RecipeError(f"{what} (rank {other} and rank 0); start all of them with the same command"))


def unlearn(
    model: Any,
    forget: int | list[int],
    cover: int | list[int],
    retain: list[int] | None = None,
    method: str | None = None,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    quiet: bool = True,
    null_class: int | None = None,
    audit: bool | dict[str, Any] = False,
    **keys: Any,
) -> RunResult:
    """Make a class-conditional diffusion model forget classes, from Python.

    model: shipped name, diffusers folder, hub name, or an object with `.unet` and `.scheduler` (a diffusers pipeline).
    method: one of `pecker-fast recipes methods`; None = the recipe's (pecker by default).
    output: None = the recipe's, or runs/unlearn.
    recipe: what the other settings come from (name, file or Recipe); keys: recipe keys, sections as dicts.
    null_class: index of the label-dropout embedding, if it has one; None = what the recipe, or the model's folder, says.
    audit: attack the result at the end; True = all probes at the standard budget, or the recipe's `audit` keys as a dict.
    Raises PeckerError subclasses, one line each.
    """
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    data = base.model_dump(by_alias=True, exclude_unset=True)  # so that defaults stay defaults
    if method is not None and method in methods():
        data = for_method(data, method)
    if output is None:
        output = "runs/unlearn" if recipe is None else base.output
    if not isinstance(model, str | Path):
        model = _write_base(model, Path(output), null_class)
    elif null_class is not None:
        keys["null_class"] = null_class
    given = {"model": str(model), "forget": forget, "cover": cover, "output": str(output), **keys}
    given |= {key: value for key, value in (("method", method), ("retain", retain)) if value is not None}
    if audit:
        given["audit"] = {"budget": "standard", **(audit if isinstance(audit, dict) else {})}
    for key, value in given.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return train(recipe_from(data, "unlearn"), quiet=quiet)


def distill(
    folder: Path,
    *,
    steps: int,
    seed: int,
    into: Path,
    keys: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    without: Sequence[int | str] = (),
    quiet: bool = False,
) -> None:
    """Distil a one-step generator from the teacher in `folder`; write `into`/generator (averaged θ) and `into`/score (ψ), all
    classes, both at once.

    keys: further recipe keys (lr, ema, ...); dtype: what the weights are stored as. without: classes, or words of prompts, under
    which nothing is drawn.
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
    if recipe.engine.zero:
        raise RecipeError("engine.zero: distilling a generator beside its teacher is one process; leave it out")
    parts = load_parts(recipe)
    parts.conditions = _known(parts, without)
    recipe = fit_timesteps(recipe, parts.teacher.schedule.num_timesteps)
    identity = identity_of(recipe, parts)
    plan = plan_run_folder(recipe, identity)
    with locked(run_dir), StopFlag() as stop:
        open_run_folder(recipe, plan)
        with Tracker(run_dir, console="none" if quiet else "auto") as tracker:
            training = Training(recipe, parts, identity, tracker, stop, None, time.perf_counter())
            state = training.distilled(plan.checkpoint)
    with whole_folder(into) as temporary:
        assert state.score is not None
        for name, network in (("generator", state.averaged_generator()), ("score", state.score)):
            write_unet(network, temporary / name, dtype)
    discard(run_dir)


def _known(parts: Parts, without: Sequence[int | str]) -> Conditions:
    """The conditions of plain distillation without some classes, or without the prompts that name one of some words."""
    conditions, gone = parts.conditions, set(without)
    if parts.text is not None and without:
        plan, named = parts.text.plan, Names([str(word) for word in without], related=True)
        rows = zip((*conditions.forget, *conditions.retain), (*plan.forget, *plan.retain))
        gone = {row for row, text in rows if named.search(text)}
    return replace(conditions, all_classes=tuple(c for c in conditions.all_classes if c not in gone))


def identity_of(recipe: Recipe, parts: Parts) -> dict[str, str]:
    """What a checkpoint belongs to, and the prompts in words."""
    prompts = {"prompts_sha256": parts.text.prompts_sha256} if parts.text is not None else {}
    return {
        "recipe_sha256": trajectory_sha256(recipe),
        "base_sha256": parts.base_sha256,
        "start_sha256": parts.start_sha256,
        **prompts,
    }


def dry_run_text(recipe: Recipe) -> list[tuple[str, str]] | None:
    """For a hub model: look at all but the weights, which are not fetched for it. None for every other recipe."""
    if not recipe.uses_prompts or not is_hub_name(recipe.model):
        return None
    plan, _ = plan_of(recipe, None)
    note(notes_of(plan))
    folder = plan_run_folder(recipe, {})
    if folder.checkpoint is None:
        check_start(recipe)
    notes = look_at_hub(recipe)
    note(notes or ())
    looked = (
        "only its configs were fetched" if notes is not None else "the hub could not be asked, so it was not looked at"
    )
    model = ("model", f"{recipe.model} of the Hugging Face hub; {looked}")
    return [model, *prompt_rows(plan), *run_rows(recipe, folder.checkpoint)]


def _forget_images(recipe: Recipe, parts: Parts) -> ForgetImages | None:
    """`mask.data=PATH`: the user's own images of the forget class, dealt in order; no other data set is ever opened."""
    if not recipe.uses_mask or recipe.mask.source != "saliency" or recipe.mask.data in ("pseudo", "teacher"):
        return None
    from pecker_fast.data import forget_images

    if isinstance(parts.teacher, TextDenoiser) and parts.text is not None:
        teacher, (height, width) = parts.teacher, parts.text.pixels
        deal = forget_images(recipe.mask.data, (3, height, width), [0])  # one folder for all prompts
        return lambda rows, index: teacher.to_latents(deal(torch.zeros_like(rows).cpu(), index).to(rows.device))
    names = _class_names(parts.folder)
    return forget_images(recipe.mask.data, parts.teacher.sample_shape, parts.conditions.forget, names)


def _class_names(folder: Path) -> list[str] | None:
    """What the classes of a model are called, by number, where its model.json says so."""
    card = read_json(folder / "model.json", error=ModelError) if (folder / "model.json").is_file() else None
    names = card.get("class_names") if isinstance(card, dict) else None
    valid = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    return names if valid else None


def _write_base(model: Any, output: Path, null_class: int | None) -> Path:
    """An in-memory pipeline (anything with `.unet` and `.scheduler`) as the model folder `output`/base."""
    unet, scheduler = getattr(model, "unet", None), getattr(model, "scheduler", None)
    if unet is None or scheduler is None:
        raise ModelError(
            f"model: {type(model).__name__} has no .unet and .scheduler; give a pipeline, a folder or a name"
        )
    folder = output / BASE
    there = [entry for entry in output.iterdir() if not is_ours(entry)] if output.is_dir() else []
    if there and not is_run_folder(output) and not folder.is_dir():
        raise OutputError(f"{output}: is not empty and not a run folder; give another output")
    if folder.is_dir():
        mine, theirs = (sha256_tensors(network.named_parameters()) for network in (unet, load_unet(folder / "unet")))
        if mine != theirs:
            raise OutputError(f"{folder}: holds another model; give another output")
    with whole_folder(folder) as temporary:
        write_json(temporary / "unet" / CONFIG_NAME, json.loads(unet.to_json_string()))
        write_tensors(temporary / "unet" / WEIGHTS_NAME, unet.state_dict(), {"format": "pt"})
        scheduler.save_pretrained(temporary / "scheduler")
        if null_class is not None:
            write_json(temporary / "model.json", {"null_class": null_class})
    return folder
