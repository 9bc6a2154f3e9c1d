"""`pecker-fast bench`: an iteration of a recipe without and with its mask, part by part, in turns in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pecker_kernels import SaliencyMask

from pecker_fast import files
from pecker_fast.account import Account, Clock, add_times, counted, joules, stopwatch
from pecker_fast.engine import LocalEngine, TrainState, begin_anchor, begin_pool
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.loading import Parts, fit_timesteps, load_parts, pick_device
from pecker_fast.machine import hardware
from pecker_fast.recipe import Recipe, recipe_from, recipe_to_dict
from pecker_fast.runs.loop import iteration

WARM_UP = 2


@dataclass
class Setup:
    """An engine at the start of its forget stage. `mask_cost`: seconds and FLOPs of making the mask."""

    recipe: Recipe
    engine: LocalEngine
    state: TrainState
    mask: SaliencyMask | None
    mask_cost: dict[str, float]

    def iterate(self) -> dict[str, torch.Tensor]:
        return iteration(self.engine, self.state)


def set_up(recipe: Recipe, parts: Parts | None = None) -> Setup:
    """Networks on the device (θ and ψ copies of `parts`, φ shared), mask, optimizers, engine. Writes nothing."""
    if recipe.engine.zero:
        raise RecipeError("engine.zero: bench measures one process; leave it out")
    if recipe.facts.kind == "edit":
        raise RecipeError(f"method: {recipe.method} is in closed form, there is no iteration to measure")
    parts, device = parts or load_parts(recipe), pick_device()
    recipe = fit_timesteps(recipe, parts.teacher.schedule.num_timesteps)
    engine = LocalEngine(recipe, parts.conditions, device)
    score = None if parts.score is None else parts.score.clone()
    state = engine.start(parts.teacher, score, parts.generator.clone())
    begin_pool(engine, state)
    meter = stopwatch(device)
    start = meter()
    mask = engine.make_mask(state) if recipe.uses_mask else None
    cost = {}
    if mask is not None:
        seconds = meter() - start
        with engine.autocast():
            flops = engine.saliency_pass(state).flops()
        cost = {"s": seconds, "flops": flops}
    engine.follow(state, mask)
    begin_anchor(engine, state)
    engine.attacks.begin(state)
    return Setup(recipe, engine, state, mask, cost)


def dense_of(recipe: Recipe) -> Recipe:
    """The same recipe without a mask."""
    data = recipe_to_dict(recipe)
    return recipe_from({**data, "mask": {**data["mask"], "source": "none"}}, "bench")


def bench(recipe: Recipe, iterations: int, json_file: Path | None = None) -> dict[str, Any]:
    """The accounts of a dense and a masked iteration (the dense one alone for a recipe without mask), as `--json` has them.

    Raises PeckerError for a recipe that needs images from a folder, and for a file that cannot be written.
    """
    if recipe.uses_mask and recipe.mask.source == "saliency" and recipe.mask.data not in ("pseudo", "teacher"):
        raise RecipeError(f"mask.data: bench opens no images, got {recipe.mask.data!r}; use pseudo or teacher")
    if recipe.images.is_folder and not recipe.one_step:
        raise RecipeError(f"images.source: bench opens no images, got {recipe.images.source!r}; use pool or trajectory")
    if recipe.engine.cuda_graph:
        raise RecipeError("engine.cuda_graph: a graph has no parts to be timed by; bench without it")
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise OutputError(f"--json {json_file}: not a file in a folder that is there; give another")
    if json_file is not None:
        files.check_json(json_file, ("machine", "variants"))
    parts = load_parts(recipe)
    recipe = fit_timesteps(recipe, parts.teacher.schedule.num_timesteps)
    recipes = {"dense": dense_of(recipe)} | ({"masked": recipe} if recipe.uses_mask else {})
    setups: dict[str, Setup] = {}
    accounts: dict[str, Account] = {}
    for name, one in recipes.items():
        # What the other variant holds is alive here too, and no part of this one's peak.
        others = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        setups[name] = set_up(one, parts)
        accounts[name] = account_of(setups[name], others)
    measure({name: setup.iterate for name, setup in setups.items()}, accounts, iterations)
    result = {
        "machine": hardware.environment(),
        "recipe": recipe_to_dict(recipe) | {"output": None},
        "weights": sum(p.numel() for _, p in parts.generator.named_parameters()),
        "iterations": iterations,
        "variants": accounts,
    }
    if json_file is not None:
        files.write_json(json_file, result)
    return result


def account_of(setup: Setup, others_bytes: int = 0) -> Account:
    """A warm setup's account without times; the mask's cost is spread over the iterations it serves."""
    for _ in range(WARM_UP):
        setup.iterate()
    account = counted(setup.engine, setup.state, allocator=setup.engine.device)
    if account["peak_allocated_bytes"] is not None:
        account["peak_allocated_bytes"] -= others_bytes
        for one in account["parts"].values():
            if "peak_allocated_bytes" in one:
                one["peak_allocated_bytes"] -= others_bytes
    if setup.mask is not None:
        over = setup.recipe.mask.refresh or max(setup.recipe.steps, 1)
        account["mask"] = {
            "ms": 1e3 * setup.mask_cost["s"] / over, "flops": setup.mask_cost["flops"] / over,
            "iterations": over, "density": setup.mask.density, "structure": setup.mask.structure,
        }  # fmt: skip
    return account


def measure(runs: dict[str, Callable[[], object]], accounts: dict[str, Account], iterations: int) -> None:
    """Whole iterations and iterations by part, each variant once a round; energy in rounds of its own, where it can be read."""
    device = pick_device()
    meter, energy = stopwatch(device), joules(device)
    whole: dict[str, list[float]] = {name: [] for name in runs}
    clocks = {name: Clock(meter) for name in runs}
    meters = {name: Clock(energy) for name in runs} if energy is not None else {}
    for _ in range(iterations):
        for name, run in runs.items():
            start = meter()
            run()
            whole[name].append(1e3 * (meter() - start))
            with clocks[name].lap():
                run()
    for _ in range(iterations if meters else 0):
        for name, clock in meters.items():
            with clock.lap():
                runs[name]()
    for name, account in accounts.items():
        add_times(account, clocks[name])
        account["iteration_ms"] = spread(whole[name])
        account["energy_j"] = None  # not measurable on a processor
        if name in meters:
            means = meters[name].means()
            account["energy_j"] = sum(means.values())
            for part, value in means.items():
                account["parts"][part]["energy_j"] = value


def spread(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
