"""The stages of the check, in order: what is most worth knowing first, each with a limit of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """name: as STAGES=… has it. run: the function of stages.py, with these words. limit_s: then it is ended. blocking: every launch
    waits for its kernel, so that a fault is seen where it happens."""

    name: str
    run: str
    words: tuple[str, ...] = ()
    limit_s: float = 60
    blocking: bool = False


PLAN = (
    Stage("env", "env", limit_s=40),
    Stage("smoke", "smoke", limit_s=75, blocking=True),
    Stage("step", "step", limit_s=100),
    Stage("select", "select", limit_s=90),
    Stage("iteration-dense-8", "iteration", ("sd15", "8", "dense", "graph"), 75),
    Stage("iteration-rows-1", "iteration", ("sd15", "1", "rows", "graph"), 60),
    Stage("cases", "tests", ("tests/kernels/gpu/triton_cases",), 110),
    Stage("loop", "tests", ("tests/engine/test_loop_gpu.py",), 60),
    Stage("iteration-dense-1", "iteration", ("sd15", "1", "dense", "graph"), 50),
    Stage("iteration-eager-1", "iteration", ("sd15", "1", "dense", "eager"), 50),
    Stage("products", "products", limit_s=30),
    Stage("norm", "norm", limit_s=30),
    Stage("digits-graph", "digits", ("graph",), 60),
    Stage("digits-eager", "digits", ("eager",), 60),
)
NAMES = tuple(stage.name for stage in PLAN)


def chosen(names: str) -> list[Stage]:
    """The stages of a list with commas between, "" = all; "iteration" stands for all that begin so. Raises ValueError."""
    if not names:
        return list(PLAN)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(_named(stage, name) for stage in PLAN):
            raise ValueError(f"STAGES: {name!r} is no stage; they are {', '.join(NAMES)}")
    return [stage for stage in PLAN if any(_named(stage, name) for name in wanted)]


def _named(stage: Stage, name: str) -> bool:
    return stage.name == name or stage.name.startswith(f"{name}-")
