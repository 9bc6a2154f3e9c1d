"""What a run makes before its first iteration beside the mask, all of it counted as training: a method's images and springs, the
adversary's images, or the whole of an edit."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from pecker_fast.engine import LocalEngine, TrainState, begin_anchor, begin_pool
from pecker_fast.engine import edit as engine_edit
from pecker_fast.forgetting import OwnImages
from pecker_fast.machine import StopFlag
from pecker_fast.machine.ranks import Ranks
from pecker_fast.recipe import Recipe
from pecker_fast.records import POOL, keep_pool, kept_pool

Work = Callable[[Callable[[], object]], object]  # called with what is to be polled


class Beginning(Protocol):
    """The run, as far as this needs it."""

    recipe: Recipe
    engine: LocalEngine
    ranks: Ranks
    stop: StopFlag
    device: torch.device
    run_dir: Path
    own_images: OwnImages | None

    def leaving(self, state: TrainState, where: str) -> AbstractContextManager[None]: ...


def timed(run: Beginning, state: TrainState, what: str, work: Work) -> None:
    """A piece of work that counts as training, and may be left off."""
    start = time.perf_counter()
    where = f"stopped while {what}; the same command goes on"
    with run.ranks.running(), run.leaving(state, where):
        work(lambda: run.stop.check(where))
    state.training_s += time.perf_counter() - start


def pool(run: Beginning, state: TrainState) -> None:
    """The images that a method learns from: drawn once, kept in the run folder."""
    if run.recipe.one_step:
        return
    timed(
        run, state, "images to learn from were drawn", lambda poll: begin_pool(run.engine, state, poll, run.own_images)
    )
    _keep(run, state)


def anchor(run: Beginning, state: TrainState) -> None:
    """What holds weights where they were; nothing where the method has none."""
    if not run.engine.objective.anchored:
        return
    timed(run, state, "what holds the weights was weighed", lambda poll: begin_anchor(run.engine, state, poll))


def edit(run: Beginning, state: TrainState) -> None:
    """All of a method in closed form; nothing for one with iterations."""
    if run.recipe.facts.kind != "edit":
        return
    timed(run, state, "weights were solved for", lambda poll: engine_edit(run.engine, state))


def attacks(run: Beginning, state: TrainState) -> None:
    """The adversary's images, of θ as forgetting finds it; their FLOPs count as well. Nothing where the recipe has none."""
    if not run.recipe.uses_adversary:
        return
    timed(run, state, "the adversary's images were drawn", lambda poll: run.engine.attacks.begin(state, poll))
    if not run.engine.sharded:
        state.flops += run.engine.attacks.pool_flops(state)


def again(run: Beginning, state: TrainState, source: Path) -> None:
    """What a run that goes on does not find in its checkpoint: the images of the folder `source`, or drawn again, and the springs.
    Their time was counted when they were made first."""
    if run.recipe.one_step:
        return
    spent = state.training_s
    state.pool = run.ranks.told(lambda: kept_pool(source / POOL, run.device))
    if state.pool is None:
        pool(run, state)
    elif source != run.run_dir.resolve():
        _keep(run, state)
    anchor(run, state)
    state.training_s = spent


def _keep(run: Beginning, state: TrainState) -> None:
    found = state.pool
    if found is not None:
        run.ranks.first(lambda: keep_pool(found, run.run_dir / POOL))
