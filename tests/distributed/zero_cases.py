"""What a rank does in the tests of the sharded engine. Everything it returns is plain, and small."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore")

KEYS: dict[str, Any] = {
    "forget": 0, "cover": 1, "batch_size": 8, "mask": {"samples": 24, "density": 0.3}, "ema": 0.9,
    "optimizer": {"eps": 1.0}, "lr": 3e-4, "evaluate": {"every": 0, "final": 0},
}  # fmt: skip


def recipe_of(model: Path, keys: dict[str, Any], zero: int):
    from pecker_fast.config import recipe_from

    data = {**KEYS, "model": str(model)}
    for key, value in {**keys, "engine": {**keys.get("engine", {}), "zero": zero}}.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return recipe_from(data)


def make(model: Path, keys: dict[str, Any], zero: int, ranks: Any):
    """(engine, state with its mask, conditions) at the start of the forget stage."""
    from pecker_fast.parts import load_parts
    from pecker_fast.training import engine_of

    recipe = recipe_of(model, keys, zero)
    parts = load_parts(recipe)
    engine = engine_of(recipe, parts, torch.device("cpu"), ranks)
    state = engine.start(parts.teacher, parts.score, parts.generator)
    mask = engine.make_mask(state, parts.conditions) if recipe.uses_mask else None
    engine.follow(state, mask)
    return engine, state, parts


def iterate(engine: Any, state: Any, steps: int) -> dict[str, float]:
    from pecker_fast.loop import iteration

    losses: dict[str, float] = {}
    for _ in range(steps):
        losses = engine.means(iteration(engine, state))
    return losses


def outcome(engine: Any, state: Any, losses: dict[str, float]) -> dict[str, Any]:
    """What is compared; the weights are on rank 0."""
    generator = engine.averaged(state)
    weights = None if generator is None else {name: p.detach() for name, p in generator.named_parameters()}
    mask = state.mask
    return {"mask": mask and (mask.digest, mask.count), "losses": losses, "weights": weights, "images": state.images}


def train_once(rank: int, model: Path, keys: dict[str, Any], zero: int, steps: int) -> dict[str, Any]:
    """A run's iterations: on ranks with zero, else on this process alone."""
    from pecker_fast.ranks import ALONE, joined

    if not zero:
        engine, state, _ = make(model, keys, 0, ALONE)
        return outcome(engine, state, iterate(engine, state, steps))
    with joined(60.0) as ranks:
        engine, state, _ = make(model, keys, zero, ranks)
        return outcome(engine, state, iterate(engine, state, steps))


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
