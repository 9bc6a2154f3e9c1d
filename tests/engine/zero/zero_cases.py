"""What a rank does in the tests of the sharded engine. Everything it returns is plain, and small."""

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore")

KEYS: dict[str, Any] = {
    "forget": 0, "cover": 1, "batch_size": 8, "mask": {"samples": 24, "density": 0.3}, "ema": 0.9,
    "optimizer": {"eps": 1.0}, "lr": 3e-4, "evaluate": {"every": 0, "final": 0},
}  # fmt: skip


CAPTIONS = ["a red circle on the left", "a photo of the blue circle", "small circle"]
TEXT: dict[str, Any] = {
    "forget": {"concept": "circle", "captions": CAPTIONS}, "cover": "square", "retain": ["a red square", "green star"],
    "timesteps": {"init": 625, "min": 20, "max": 980}, "alpha": 1.0, "lr": 5e-5,
    "guidance": {"score_train": 2.0, "score": 2.0, "teacher": 2.0, "text_dropout": 0.1},
}  # fmt: skip


def recipe_of(model: Path | str, keys: dict[str, Any], zero: int):
    """A recipe over a model folder, or the shipped recipe of that name with its own settings but for size, rate and eps."""
    from pecker_fast.recipe import load_recipe, recipe_from, recipe_to_dict

    data = {**KEYS, "model": str(model)}
    if isinstance(model, str):
        data = recipe_to_dict(load_recipe(model)) | {"batch_size": 8}
        data["mask"] |= {"samples": 24}
        data["optimizer"] |= {"eps": 1.0}
        data["lr"] = KEYS["lr"]
    for key, value in {**keys, "engine": {**keys.get("engine", {}), "zero": zero}}.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return recipe_from(data)


def make(model: Path, keys: dict[str, Any], zero: int, ranks: Any):
    """(engine, state with its mask, conditions) at the start of the forget stage."""
    from pecker_fast.engine import begin_pool
    from pecker_fast.loading.parts import load_parts
    from pecker_fast.runs.training import engine_of

    recipe = recipe_of(model, keys, zero)
    parts = load_parts(recipe)
    with (
        torch.no_grad()
    ):  # off φ, as after a few steps: where all three agree the retain gradient is rounding and nothing else
        for seed, network in ((1, parts.score), (2, parts.generator)):
            rng = torch.Generator().manual_seed(seed)
            for _, p in () if network is None else network.named_parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=rng))
    engine = engine_of(recipe, parts, torch.device("cpu"), ranks)
    state = engine.start(parts.teacher, parts.score, parts.generator)
    begin_pool(engine, state)
    mask = engine.make_mask(state) if recipe.uses_mask else None
    engine.follow(state, mask)
    engine.attacks.begin(state)
    return engine, state, parts


def iterate(engine: Any, state: Any, steps: int) -> dict[str, float]:
    from pecker_fast.runs.loop import iteration

    losses: dict[str, float] = {}
    for _ in range(steps):
        losses = engine.means(iteration(engine, state))
    return losses


def outcome(engine: Any, state: Any, losses: dict[str, float]) -> dict[str, Any]:
    """What is compared; the weights are on rank 0."""
    generator = engine.averaged(state)
    weights = None if generator is None else {name: p.detach() for name, p in generator.named_parameters()}
    mask = state.mask
    vectors = state.adversary and state.adversary.vectors.values
    return {
        "mask": mask and (mask.digest, mask.count), "losses": losses, "weights": weights, "images": state.images, "vectors": vectors
    }  # fmt: skip


def train_once(rank: int, model: Path, keys: dict[str, Any], zero: int, steps: int) -> dict[str, Any]:
    """A run's iterations: on ranks with zero, else on this process alone."""
    from pecker_fast.machine.ranks import ALONE, joined

    if not zero:
        engine, state, _ = make(model, keys, 0, ALONE)
        return outcome(engine, state, iterate(engine, state, steps))
    with joined(60.0) as ranks:
        engine, state, _ = make(model, keys, zero, ranks)
        return outcome(engine, state, iterate(engine, state, steps))


def train_each(rank: int, model: Path, cases: dict[str, dict[str, Any]], zero: int, steps: int) -> dict[str, Any]:
    """train_once for many settings of one stage, one after the other: {case: outcome}."""
    from pecker_fast.machine.ranks import joined

    found = {}
    with joined(60.0) as ranks:
        for name, keys in cases.items():
            engine, state, _ = make(model, keys, zero, ranks)
            found[name] = outcome(engine, state, iterate(engine, state, steps))
    return found


IDENTITY = {"recipe_sha256": "r", "base_sha256": "b"}


def train_and_save(
    rank: int, model: Path, cases: dict[str, dict[str, Any]], zero: int, steps: int, folder: Path
) -> None:
    """The first part of runs, left in checkpoints."""
    from pecker_fast.machine.ranks import joined
    from pecker_fast.records.checkpoint import save_checkpoint

    with joined(60.0) as ranks:
        for name, keys in cases.items():
            engine, state, _ = make(model, keys, zero, ranks)
            iterate(engine, state, steps)
            save_checkpoint(state, folder / name, steps, IDENTITY, 2, ranks)


def resume(
    rank: int, model: Path, cases: dict[str, dict[str, Any]], zero: int, steps: int, folder: Path
) -> dict[str, Any]:
    """The rest of them, on this many ranks: {case: outcome}."""
    from pecker_fast.loading.parts import load_parts
    from pecker_fast.machine.ranks import joined
    from pecker_fast.records.checkpoint import latest_checkpoint, load_checkpoint, read_checkpoint_stage
    from pecker_fast.runs.training import engine_of

    found = {}
    with joined(60.0) as ranks:
        for name, keys in cases.items():
            recipe = recipe_of(model, keys, zero)
            parts = load_parts(recipe)
            engine = engine_of(recipe, parts, torch.device("cpu"), ranks)
            state = engine.start(parts.teacher, parts.score, parts.generator)
            checkpoint = latest_checkpoint(folder / name, print)
            state.stage, mask = read_checkpoint_stage(checkpoint)
            engine.follow(state, mask)
            load_checkpoint(state, checkpoint, IDENTITY)
            assert state.step == int(checkpoint.name[5:])
            found[name] = outcome(engine, state, iterate(engine, state, steps - state.step))
    return found


def outside(rank: int, model: Path, keys: dict[str, Any], zero: int, steps: int) -> tuple[str, str]:
    """sha256 of all weights outside the mask, as this rank sees them, before and after."""
    from pecker_fast.machine.ranks import joined

    with joined(60.0) as ranks:
        engine, state, _ = make(model, keys, zero, ranks)
        network = state.networks["generator"]

        def seen() -> str:
            whole = dict(network.collect(network.partition.detach()))
            return sha256({name: w[~state.mask.bool(name)] for name, w in whole.items()})

        before = seen()
        iterate(engine, state, steps)
        return before, seen()


def non_finite(rank: int, model: Path, keys: dict[str, Any], zero: int, which: str) -> tuple[str, bool, bool]:
    """What a NaN that rank 1 alone meets comes to: (message, silent, this rank's weights are unchanged)."""
    from pecker_fast.errors import NonFiniteError
    from pecker_fast.machine.ranks import joined

    with joined(60.0) as ranks:
        engine, state, _ = make(model, keys, zero, ranks)
        iterate(engine, state, 1)
        network = state.networks[which]
        before = network.partition.detach().clone()
        if rank == 1:
            next(iter(network.parameters.values())).register_hook(lambda g: g * float("nan"))
            if engine.compact_rule and which == "generator":
                exchange, flat = engine.exchange, engine.exchange.flat
                exchange.flat = lambda gradients: flat(gradients) * float("nan")
        try:
            iterate(engine, state, 1)
        except NonFiniteError as error:
            return str(error), error.silent, bool(torch.equal(before, network.partition.detach()))
        return "nothing was raised", False, False


def held_bytes(rank: int, model: Path, keys: dict[str, Any], zero: int) -> dict[str, int]:
    """Bytes this rank holds between iterations, by kind, of θ."""
    from pecker_fast.account.iteration import unique_bytes
    from pecker_fast.machine.ranks import joined

    with joined(60.0) as ranks:
        engine, state, _ = make(model, keys, zero, ranks)
        check, handed = engine._check, []

        def spy(state: Any, what: str, gradients: Any) -> None:
            if what == "generator":
                handed.append(sum(g.nbytes for _, g in gradients))
            check(state, what, gradients)

        engine._check = spy
        iterate(engine, state, 2)
        network = state.networks["generator"]
        optimizers = state.updates.optimizers.values()
        moments = [t for o in optimizers for s in o.state.values() for k, t in s.items() if k != "step"]
        shards = [p.ds_tensor for p in network.parameters.values()] if zero == 3 else list(network.parameters.values())
        return {
            "parameters": unique_bytes([*shards, network.partition]),
            "moments": unique_bytes(moments),
            "average": unique_bytes(list(state.ema.values())),
            "gradients": handed[-1],  # what a step is handed
            "mask": sum(bits.nbytes for bits in state.mask.bits.values()),
            "partition": network.partition.numel(),
        }


def first_gradient(rank: int, model: Path, keys: dict[str, Any], zero: int) -> tuple[list, torch.Tensor, float]:
    """θ's gradient of the first generator step, through the frozen ψ: (this rank's pieces, its vector, |ψ's gradient|)."""
    from pecker_fast.machine.ranks import ALONE, joined

    if not zero:
        engine, state, _ = make(model, keys, 0, ALONE)
        engine.score_step(state)
        named = state.generator.named_parameters()
        grads, _ = engine.branch_gradients(state, {"retain": 1.0, "forget": 1.0}, separate=False)
        vector = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for g, (_, p) in zip(grads["sum"], named)]
        )
        return (
            [],
            vector,
            sum(0.0 if p.grad is None else float(p.grad.norm()) for _, p in state.score.named_parameters()),
        )
    with joined(60.0) as ranks:
        engine, state, _ = make(model, keys, zero, ranks)
        engine.score_step(state)
        found = []
        network = state.networks["generator"]
        network.step = lambda optimizer: found.append(network.gradients())
        engine.generator_step(state)
        vector = torch.zeros(network.shards.total)
        for piece, first, (name, g) in zip(network.shards.pieces, network.shards.offsets(), found[0]):
            assert piece.name == name
            vector[first : first + piece.numel] = g.flatten()[: piece.numel].float()
        stray = sum(float(g.norm()) for _, g in state.networks["score"].gradients())
        return [], vector, stray


def broken(rank: int, model: Path, keys: dict[str, Any], zero: int, steps: int, how: str) -> dict[str, Any]:
    """train_once with an implementation that is wrong: the gates have to see it."""
    import contextlib

    from pecker_fast.engine.zero import Sharded

    def unmasked(self, mask):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def merged_first(self, mask):
        yield
        if mask is not None:
            for name, p in self.parameters.items():
                p.grad.mul_(mask.bool(name))

    if how == "summed":
        backward = Sharded.backward
        Sharded.backward = lambda self, loss: backward(self, 2 * loss)
    else:
        Sharded.masked_gradients = {"unmasked": unmasked, "merged_first": merged_first}[how]
    return train_once(rank, model, keys, zero, steps)


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def without_a_launcher(rank: int, model: Path, folder: Path) -> tuple[str, dict[str, str], dict[str, str], int]:
    """A refused recipe, then a run, both of engine.zero in a process nobody launched.

    (the refusal, the environment before and after, how many checkpoints the run left).
    """
    from pecker_fast.errors import RecipeError
    from pecker_fast.recipe import recipe_from
    from pecker_fast.runs import train

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        del os.environ[name]
    os.environ["MASTER_ADDR"] = "somebody.else"
    before, refusal = dict(os.environ), ""
    keys = {**KEYS, "model": str(model), "output": str(folder / "run"), "engine": {"zero": 1}, "steps": 2}
    try:
        train(recipe_from({"model": str(model), "output": str(folder / "no"), "method": "sa", "engine": {"zero": 1}}))
    except RecipeError as error:
        refusal = str(error)
    train(recipe_from(keys), quiet=True)
    return refusal, before, dict(os.environ), len(list((folder / "run" / "checkpoints").iterdir()))
