"""What is known of a run before it starts, for `doctor` and `train --dry-run`: rows of (name, value)."""

from __future__ import annotations

from pathlib import Path

from pecker_fast.account.memory import Prediction, size
from pecker_fast.conditions import PromptPlan
from pecker_fast.loading import Parts
from pecker_fast.machine import Device, device_of
from pecker_fast.networks import TextDenoiser
from pecker_fast.recipe import Recipe
from pecker_fast.runs.forecast import check_memory, iteration_seconds

Rows = list[tuple[str, str]]
NOT_MANY = "not predicted for many ranks; docs/scaling.md has the formula"
NOT_FETCHED = "not known before the model is fetched from the hub"


def time_rows(recipe: Recipe, prediction: Prediction, device: Device) -> Rows:
    """Time of an iteration and of the run; estimates, and said to be."""
    found = iteration_seconds(recipe, prediction, device)
    if found is None:
        return []
    seconds, source = found
    stages = (("distill", recipe.distill_steps, "distillation"), ("forget", recipe.steps, "forgetting"))
    rows, whole = [], 0.0
    for stage, steps, name in stages:
        if stage not in seconds or not steps:
            continue
        flops = prediction.flops[stage]
        rows.append((f"an iteration of {name}", f"{_time(seconds[stage])}: {flops / 1e12:.3g} TFLOP {source}"))
        whole += steps * seconds[stage]
    steps = recipe.distill_steps + recipe.steps
    return [*rows, (f"{steps} iterations", f"{_time(whole)}, without mask and evaluation")] if rows else []


def plan_rows(recipe: Recipe, device_text: str | None = None) -> tuple[Rows, Rows]:
    """(device and time, memory) of the recipe on a device, see `device_of`. Raises TooLarge where it will not fit."""
    device = device_of(device_text)
    there = [("device", f"{device.name}, {size(device.memory_bytes) if device.memory_bytes else 'memory not known'}")]
    if recipe.engine.zero:
        return there, [("memory", NOT_MANY)]
    prediction = check_memory(recipe, device)
    if prediction is None:
        return there, [("memory", NOT_FETCHED)]
    return [*there, *time_rows(recipe, prediction, device)], prediction.table()


def planned(recipe: Recipe, device_text: str | None = None) -> Rows:
    """`plan_rows` with the memory on one line."""
    rows, memory = plan_rows(recipe, device_text)
    if len(memory) == 1:
        return [*rows, *memory]
    *parts, (_, peak) = memory
    return [*rows, ("memory (predicted)", f"{peak}: {', '.join(f'{name} {value}' for name, value in parts)}")]


def found_rows(recipe: Recipe, parts: Parts) -> Rows:
    """What was loaded: the model, where θ starts, what is to be forgotten, who judges."""
    teacher = parts.teacher
    weights = sum(p.numel() for _, p in teacher.named_parameters())
    shape = "×".join(map(str, teacher.sample_shape))
    rows = [("model", f"{parts.folder}: {type(teacher.unet).__name__}, {weights:,} weights, samples of {shape}")]
    rows += [("start", str(recipe.generator))] if recipe.generator else []
    if isinstance(teacher, TextDenoiser) and parts.text is not None:
        rows += prompt_rows(parts.text.plan)
    else:
        c = parts.conditions
        pairs = ", ".join(f"{f} (draw {o})" for f, o in zip(c.forget, c.cover))
        rows += [("forget", f"classes {pairs}"), ("retain", f"{len(c.retain)} classes of {len(teacher.classes)}")]
        rows += [("null class", "none" if teacher.null_class is None else str(teacher.null_class))]
    judged = parts.judge is not None or parts.words is not None
    judge = recipe.evaluate.judge or "beside the model"
    return [*rows, ("judge", judge if judged else "none; the run is not judged")]


def prompt_rows(plan: PromptPlan) -> Rows:
    """How many prompts of each kind, and the first of them."""
    left = f"; {plan.left_out} captions name what is forgotten and are left out" if plan.left_out else ""
    return [
        ("forget", f"{len(plan.forget)} prompts, such as {plan.forget[0]!r}, drawn as {plan.cover[0]!r}"),
        ("retain", f"{len(plan.retain)} captions, such as {plan.retain[0]!r}{left}"),
    ]


def run_rows(recipe: Recipe, checkpoint: Path | None) -> Rows:
    return [("output", f"{recipe.output}{f', goes on from {checkpoint.name}' if checkpoint else ''}")]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
