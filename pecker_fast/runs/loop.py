"""The alternating loop: score step, generator step, moving average. Everything else is a callback."""

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from pecker_fast.account import Accountant
from pecker_fast.engine import Inputs, LocalEngine, TrainState
from pecker_fast.errors import Interrupted
from pecker_fast.machine import StopFlag, part
from pecker_fast.recipe import Recipe

Losses = dict[str, Tensor]
Callback = Callable[[TrainState, Losses], None]  # called after each iteration, with the step already counted
Refresh = Callable[[TrainState], None]  # called before an iteration at which the mask is to be made anew


def steps_of(engine: LocalEngine, state: TrainState, inputs: Inputs) -> Losses:
    """The adversary, where there is one, looks for what θ still draws; ψ learns θ's distribution, θ is stepped by the update
    rule, the average follows. Nothing here waits for a device."""
    losses = engine.attacks.step(state, inputs.attacks)
    losses |= engine.score_step(state, inputs)
    losses |= engine.generator_step(state, inputs)
    with part("ema"):
        engine.average(state, inputs)
    return losses


def iteration(engine: LocalEngine, state: TrainState) -> Losses:
    """One SFD iteration: its draws, then its steps."""
    losses = engine.launch(steps_of, state, engine.inputs(state))
    state.step += 1
    return losses


def run_stage(
    recipe: Recipe,
    engine: LocalEngine,
    state: TrainState,
    steps: int,
    refresh: Refresh,
    callbacks: Sequence[Callback],
    stop: StopFlag,
    save: Callable[[TrainState], object],
) -> None:
    """Iterate until `state.step` reaches `steps`. On a signal the state is saved first, then Interrupted is raised.

    The FLOPs of one iteration are counted and stand for those of all; its account is left in the state.
    """
    again = "" if recipe.resume != "never" else " with resume=auto"
    accountant = Accountant(engine, state)
    with engine.ranks.running():
        while state.step < steps:
            engine.ranks.beat(state.step)
            start = time.perf_counter()
            try:
                if (
                    state.mask is not None
                    and recipe.mask.refresh
                    and state.step
                    and state.step % recipe.mask.refresh == 0
                ):
                    engine.settle(state)
                    refresh(state)
                losses = accountant.run(lambda: iteration(engine, state))
                engine.look(state)
                state.flops += state.flops_per_iteration[state.stage]
                state.training_s += time.perf_counter() - start - accountant.spent_s()
                for callback in callbacks:
                    callback(state, losses)
                stop.check(f"the checkpoint is written; the same command{again} resumes")
            except Interrupted:  # only ever raised between iterations, so the state is whole
                save(state)
                raise
    start = time.perf_counter()
    engine.settle(state)
    state.training_s += time.perf_counter() - start
