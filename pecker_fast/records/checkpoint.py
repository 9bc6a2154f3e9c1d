"""Checkpoints: a folder that is either whole or absent. Safetensors and JSON; a manifest with hashes is written last.

checkpoints/step-000100/
    generator.safetensors  score.safetensors  ema.safetensors  optimizers.safetensors  mask.safetensors
    adversary.safetensors   its vectors, and what they are fitted to, where there is one
    state.json      counters, optimizer groups
    shard-*.safetensors     in place of the networks, average and optimizers where a run has ranks; see shard_files
    manifest.json   whose it is, sha256 and size of every file, its own checksum; see manifest
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pecker_kernels import SaliencyMask
from torch import Size, Tensor
from torch.optim import Optimizer

from pecker_fast import files
from pecker_fast.engine import TrainState
from pecker_fast.engine.zero import ZeroState
from pecker_fast.errors import CheckpointError, PeckerError
from pecker_fast.forgetting import Adversary
from pecker_fast.machine.ranks import ALONE, Ranks
from pecker_fast.networks import Denoiser
from pecker_fast.records.finite import check_state
from pecker_fast.records.manifest import (
    NAME,
    STATE,
    ForeignCheckpointError,
    check_belongs,
    counters_of,
    verify_checkpoint,
    write_manifest,
)
from pecker_fast.records.shard_files import is_sharded, read_generator, read_shards, steps_of, write_shard

ADVERSARY = "adversary.safetensors"
COUNTERS = ("stage", "step", "images", "training_s", "flops", "flops_per_iteration")


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_checkpoint(
    state: TrainState, run_dir: Path, total_step: int, identity: dict[str, str], keep: int, ranks: Ranks = ALONE
) -> Path:
    """Write `checkpoints/step-NNNNNN` atomically, verify it, then purge all but the newest `keep`. Takes all ranks.

    identity: `recipe_sha256`, `base_sha256` and `start_sha256`, refused on a mismatch when loaded, and what else is to be written
    of where it comes from. Raises OutputError, and NonFiniteError for a state that nothing can go on from, with every
    checkpoint that was there before intact.
    """
    check_state(state, ranks)
    parent = checkpoint_folder(run_dir)
    target = parent / f"step-{total_step:06d}"

    def begin() -> Path:
        temporary = files.beside(target, "tmp")
        with files.output_errors(target):
            files.disk_step(f"mkdir:{target.name}")
            temporary.mkdir(parents=True)
        return temporary

    def write() -> None:
        with files.output_errors(target):
            _write_files(state, temporary, ranks)

    def finish() -> None:
        with files.output_errors(target):
            write_manifest(temporary, total_step, identity)
            files.replace_folder(temporary, target)
        verify_checkpoint(target)
        others = [folder for folder in list_checkpoints(run_dir) if folder != target]
        for old in others[: max(0, len(others) - keep + 1)]:  # never the one just written, whatever steps lie beside it
            files.discard(old)
        sweep_checkpoints(run_dir)

    temporary = ranks.told(begin)
    try:
        ranks.agree(write)
        ranks.first(finish)
    except BaseException:
        files.abandon(temporary)
        raise
    return target


def sweep_checkpoints(run_dir: Path) -> None:
    """Clear away what a killed process has left among the checkpoints; for the holder of the run's lock."""
    parent = checkpoint_folder(run_dir)
    for torn in parent.glob(".tmp-step-*"):  # of earlier versions
        files.discard(torn)
    files.sweep(parent)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    parent = checkpoint_folder(run_dir)
    found = [p for p in parent.glob("step-*") if NAME.fullmatch(p.name)] if parent.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(
    run_dir: Path,
    warn: Callable[[str], object],
    identity: dict[str, str] | None = None,
    distill_steps: int | None = None,
) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones, and those that are not of `identity`, are passed over with a warning.
    None where there is none at all. distill_steps: see `verify_checkpoint`.

    Raises CheckpointError if there are checkpoints but none is whole and of this run.
    """
    refused: list[PeckerError] = []
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            check_belongs(folder, verify_checkpoint(folder, distill_steps), identity or {})
        except PeckerError as error:
            refused.append(error)
            continue
        for reason in refused:
            warn(f"checkpoint passed over: {reason}")
        return folder
    if not refused:
        return None
    if all(isinstance(error, ForeignCheckpointError) for error in refused):
        raise refused[0]
    raise CheckpointError(
        f"{checkpoint_folder(run_dir)}: no checkpoint is whole ({refused[0]}); resume=never starts over"
    )


def read_checkpoint_stage(folder: Path) -> tuple[str, SaliencyMask | None]:
    """(stage, mask) of a verified checkpoint: what is needed to build the optimizers it is then loaded into."""
    path = folder / "mask.safetensors"
    return counters_of(folder)["stage"], SaliencyMask.load(path) if path.is_file() else None


def check_identity(folder: Path, identity: dict[str, str], distill_steps: int | None = None) -> None:
    """Raises CheckpointError unless the checkpoint is whole and of this recipe and base model."""
    check_belongs(folder, verify_checkpoint(folder, distill_steps), identity)


def load_checkpoint(state: TrainState, folder: Path, identity: dict[str, str]) -> None:
    """Restore everything `save_checkpoint` wrote. Raises CheckpointError for another model's or another recipe's checkpoint."""
    check_identity(folder, identity)
    stored = files.read_json(folder / STATE, error=CheckpointError)
    if isinstance(state, ZeroState):
        read_shards(state, folder, stored["optimizer_steps"])
    else:
        load_network(state.generator, folder / "generator.safetensors")
        if state.score is not None:
            load_network(state.score, folder / "score.safetensors")
        if state.ema is not None:
            tensors, _ = files.read_tensors(folder / "ema.safetensors", error=CheckpointError)
            for name, average in state.ema.items():
                average.copy_(tensors[name])
        tensors, _ = files.read_tensors(folder / "optimizers.safetensors", error=CheckpointError)
        for name, optimizer in state.optimizers.items():
            unpack_optimizer(optimizer, name, stored["optimizers"], tensors)
    for name in COUNTERS:
        setattr(state, name, stored["counters"][name])
    if (folder / ADVERSARY).is_file():
        state.adversary = read_adversary(folder / ADVERSARY, state.generator.device)


def read_adversary(path: Path, device: torch.device) -> Adversary:
    """What `save_checkpoint` wrote of the adversary. Raises CheckpointError."""
    tensors, metadata = files.read_tensors(path, error=CheckpointError)
    try:
        return Adversary.of({name: tensor.to(device) for name, tensor in tensors.items()}, int(metadata["seed"]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {error} is missing or no number; use an older one") from None


def generator_tensors(folder: Path, shapes: Mapping[str, Size], kind: str) -> dict[str, Tensor]:
    """θ of a verified checkpoint by parameter name, its raw "weights" or their average, "ema". Raises CheckpointError."""
    if is_sharded(folder):
        return read_generator(folder, shapes, kind)
    name = "generator.safetensors" if kind == "weights" else "ema.safetensors"
    return files.read_tensors(folder / name, error=CheckpointError)[0]


def load_network(network: Denoiser, path: Path) -> None:
    tensors, _ = files.read_tensors(path, error=CheckpointError)
    network.load_state(tensors, path)


def _write_files(state: TrainState, folder: Path, ranks: Ranks) -> None:
    counters = {name: getattr(state, name) for name in COUNTERS}
    if ranks.is_first and state.mask is not None:
        with files.whole_file(folder / "mask.safetensors") as target:
            state.mask.save(target)
    if ranks.is_first and state.adversary is not None:
        files.write_tensors(folder / ADVERSARY, state.adversary.tensors(), {"seed": str(state.adversary.seed)})
    if isinstance(state, ZeroState):
        write_shard(state, folder, ranks.rank, ranks.world)
        if ranks.is_first:
            files.write_json(folder / STATE, {"counters": counters, "optimizer_steps": steps_of(state)})
        return
    files.write_tensors(folder / "generator.safetensors", state.generator.state_dict())
    if state.score is not None:
        files.write_tensors(folder / "score.safetensors", state.score.state_dict())
    if state.ema is not None:
        files.write_tensors(folder / "ema.safetensors", state.ema)
    groups: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, optimizer in state.optimizers.items():
        groups[name] = pack_optimizer(optimizer, name, tensors)
    files.write_tensors(folder / "optimizers.safetensors", tensors)
    files.write_json(folder / STATE, {"counters": counters, "optimizers": groups})


def pack_optimizer(optimizer: Optimizer, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state_dict as JSON values; its tensors go into `tensors` under NAME/PATH and leave a reference behind."""

    def pack(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, dict):
            return {"items": [[key, pack(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {
                "list" if isinstance(value, list) else "tuple": [
                    pack(item, f"{path}/{i}") for i, item in enumerate(value)
                ]
            }
        json.dumps(value)  # only plain values may be left
        return {"value": value}

    return pack(optimizer.state_dict(), name)


def unpack_optimizer(optimizer: Optimizer, name: str, groups: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Inverse of `pack_optimizer`. Raises CheckpointError when the optimizer is not in the checkpoint."""

    def unpack(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "items":
            return {key: unpack(item) for key, item in content}
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(unpack(item) for item in content)
        return content

    try:
        optimizer.load_state_dict(unpack(groups[name]))
    except KeyError as error:
        raise CheckpointError(f"optimizer {name}: {error} is not in the checkpoint") from None
