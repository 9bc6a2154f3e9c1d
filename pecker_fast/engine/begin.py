"""What a method has before its first iteration beside networks and mask: images to learn from, springs, or its whole edit."""

from collections.abc import Callable

from pecker_fast.engine.local import LocalEngine
from pecker_fast.engine.state import TrainState
from pecker_fast.forgetting import Networks, OwnImages, SaliencyPass, anchor_of, make_pool


def begin_pool(
    engine: LocalEngine, state: TrainState, poll: Callable[[], object] = lambda: None, own: OwnImages | None = None
) -> None:
    """The images that a method learns from, the user's own or drawn by φ now; nothing where it has none. Takes all ranks."""
    recipe, objective = engine.recipe, engine.objective
    branches = objective.pools(recipe)
    if not branches:
        return
    with engine.autocast():
        pool = make_pool(recipe, engine.conditions, state.teacher, branches, poll, own)
        state.pool = objective.with_times(recipe, state.teacher, pool, poll)


def begin_anchor(engine: LocalEngine, state: TrainState, poll: Callable[[], object] = lambda: None) -> None:
    """What holds weights where they were: of φ, so a resumed run makes the same; nothing where the method has none."""
    if not engine.objective.anchored:
        return
    start = state.teacher.clone()
    every = engine.recipe.mask.model_copy(update={"only": [], "exclude": []})  # there is no mask: all weights are held
    recipe = engine.recipe.model_copy(update={"mask": every})
    found = SaliencyPass(recipe, state.teacher, None, start, engine.conditions, 0, None, poll, state.pool)
    with engine.autocast():
        state.anchor = anchor_of(found, state.teacher, state.generator)


def edit(engine: LocalEngine, state: TrainState) -> None:
    """Change θ in closed form, of a method that does."""
    engine.objective.edit(engine.recipe, Networks(state.teacher, state.score, state.generator), engine.conditions)
