"""NaN, ±infinity and absurd numbers in loss, gradient, weight and state: what a run makes of each, on one rank or on two."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from zero_cases import IDENTITY, make

VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 3e38}
PLACES = ("loss", "gradient", "weight", "state")
STEPS = (0, 1, 2)  # iterations done before
Case = tuple[str, str, int]
CASES: list[Case] = list(itertools.product(VALUES, PLACES, STEPS))


def meet(rank: int, model: Path, zero: int, folder: Path, cases: list[Case], bad_rank: int) -> list[dict[str, Any]]:
    """What each case comes to: the message; whether weights, and checkpoints on disk, are those of before."""
    from pecker_fast.machine.ranks import ALONE, joined

    keys = {"optimizer": {"eps": 1.0, "clip_value": 1.0}}
    if not zero:
        return [*outcomes(*make(model, keys, 0, ALONE)[:2], ALONE, folder, cases, True)]
    with joined(60.0) as ranks:
        return [*outcomes(*make(model, keys, zero, ranks)[:2], ranks, folder, cases, rank == bad_rank)]


def outcomes(
    engine: Any, state: Any, ranks: Any, folder: Path, cases: list[Case], here: bool
) -> Iterator[dict[str, Any]]:
    from pecker_fast.errors import NonFiniteError
    from pecker_fast.records.checkpoint import load_checkpoint, save_checkpoint
    from pecker_fast.runs.loop import iteration

    for step in sorted({step for *_, step in cases}):
        while state.step < step:
            iteration(engine, state)
        run_dir = folder / str(step)
        good = save_checkpoint(state, run_dir, step, IDENTITY, 1, ranks)
        on_disk = content(run_dir)
        for value, place in [case[:2] for case in cases if case[2] == step]:
            before = [t.detach().clone() for t in trained(state)]
            with hurt(state, place, VALUES[value]) if here else contextlib.nullcontext():
                try:
                    iteration(engine, state)
                    save_checkpoint(state, run_dir, step + 1, IDENTITY, 1, ranks)
                    said = "nothing was raised"
                except NonFiniteError as error:
                    said = str(error)
            same = all(torch.equal(a, b) for a, b in zip(before, trained(state)))
            found = {"case": (value, place, step), "said": said, "weights": same, "disk": content(run_dir) == on_disk}
            yield found
            forget_gradients(state)
            load_checkpoint(state, good, IDENTITY)


def trained(state: Any) -> list[torch.Tensor]:
    """Weights of ψ and θ that lie here."""
    if hasattr(state, "networks"):
        return [network.partition for network in state.networks.values()]
    return [p for denoiser in (state.score, state.generator) for _, p in denoiser.named_parameters()]


@contextlib.contextmanager
def hurt(state: Any, place: str, value: float) -> Iterator[None]:
    """Inside, the value is met in one place: the losses, ψ's gradient, θ's weights, or ψ's moments (at first the average)."""
    import pecker_fast.engine.local as local

    name, p = next((n, p) for n, p in state.score.named_parameters() if n == "conv_out.weight")
    mean = local.weighted_mean
    hook = None
    if place == "loss":
        local.weighted_mean = lambda per_sample, weights: mean(per_sample, weights) * value
    elif place == "gradient":
        hook = p.register_hook(lambda grad: torch.full_like(grad, value))
    else:
        with torch.no_grad():
            target(state, place, name).view(-1)[0] = value
    try:
        yield
    finally:
        local.weighted_mean = mean
        if hook is not None:
            hook.remove()


def target(state: Any, place: str, name: str) -> torch.Tensor:
    if place == "weight":
        if hasattr(state, "networks"):
            return state.networks["generator"].partition
        return dict(state.generator.named_parameters())[name]
    moments = [held["exp_avg_sq"] for held in state.score_optimizer.state.values()]
    return moments[0] if moments else next(iter(state.ema.values()))


def forget_gradients(state: Any) -> None:
    """What a step that was not taken has left."""
    for network in getattr(state, "networks", {}).values():
        network.optimizer.zero_grad()
        network.optimizer.averaged_gradients = {}
        network.partition.grad = None
    for p in trained(state):
        p.grad = None


def content(folder: Path) -> dict[str, str]:
    from pecker_fast import files

    return {str(p.relative_to(folder)): files.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
