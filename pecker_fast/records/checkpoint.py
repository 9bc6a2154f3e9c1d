"""Checkpoints: a folder that is either whole or absent. Safetensors and JSON; a manifest with hashes is written last.

checkpoints/step-000100/
    generator.safetensors  score.safetensors  ema.safetensors  optimizers.safetensors  mask.safetensors
    state.json      counters, optimizer groups
    shard-*.safetensors     in place of the networks, average and optimizers where a run has ranks; see shard_files
    manifest.json   format, version, step, recipe and base-model hashes, sha256 and size of every file
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pecker_kernels import SaliencyMask
from torch import Size, Tensor
from torch.optim import Optimizer

from pecker_fast import files
from pecker_fast.engine import TrainState
from pecker_fast.engine.zero import ZeroState
from pecker_fast.errors import CheckpointError, PeckerError
from pecker_fast.machine.ranks import ALONE, Ranks
from pecker_fast.networks import Denoiser
from pecker_fast.records.shard_files import is_sharded, read_generator, read_shards, steps_of, write_shard

FORMAT = "pecker-fast checkpoint"
VERSION = 1
COUNTERS = ("stage", "step", "images", "training_s", "flops", "flops_per_iteration")


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_checkpoint(
    state: TrainState, run_dir: Path, total_step: int, identity: dict[str, str], keep: int, ranks: Ranks = ALONE
) -> Path:
    """Write `checkpoints/step-NNNNNN` atomically, verify it, then purge all but the newest `keep`. Takes all ranks.

    identity: `recipe_sha256`, `base_sha256` and `start_sha256`, refused on a mismatch when loaded. Raises OutputError, with every
    checkpoint that was there before intact.
    """
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
            written = sorted(p for p in temporary.iterdir() if not files.is_left_over(p))
            entries = {p.name: {"sha256": files.sha256_file(p), "bytes": p.stat().st_size} for p in written}
            manifest = {"format": FORMAT, "version": VERSION, "step": total_step, **identity, "files": entries}
            files.write_json(temporary / "manifest.json", manifest)
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
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)] if parent.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError naming the file that is missing or altered."""
    manifest = files.read_json(folder / "manifest.json", error=CheckpointError)
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise CheckpointError(f"{folder / 'manifest.json'}: not a checkpoint manifest")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder}: checkpoint version {manifest.get('version')!r}, this release reads {VERSION}")
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint; use an older one")
        if path.stat().st_size != entry.get("bytes") or files.sha256_file(path) != entry.get("sha256"):
            raise CheckpointError(f"{path}: damaged (its sha256 is not the manifest's); use an older one")
    return manifest


def latest_checkpoint(run_dir: Path, warn: Callable[[str], object]) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a warning. None where there is none at all.

    Raises CheckpointError if there are checkpoints but none is whole.
    """
    damaged: PeckerError | None = None
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(folder)
            return folder
        except PeckerError as error:
            warn(f"checkpoint passed over: {error}")
            damaged = error
    if damaged is not None:
        raise CheckpointError(
            f"{checkpoint_folder(run_dir)}: no checkpoint is whole ({damaged}); resume=never starts over"
        )
    return None


def read_checkpoint_stage(folder: Path) -> tuple[str, SaliencyMask | None]:
    """(stage, mask) of a verified checkpoint: what is needed to build the optimizers it is then loaded into."""
    stage = files.read_json(folder / "state.json", error=CheckpointError)["counters"]["stage"]
    path = folder / "mask.safetensors"
    return stage, SaliencyMask.load(path) if path.is_file() else None


def check_identity(folder: Path, identity: dict[str, str]) -> None:
    """Raises CheckpointError unless the checkpoint is whole and of this recipe and base model."""
    manifest = verify_checkpoint(folder)
    for key, value in _as_written(identity, manifest).items():
        if manifest.get(key) != value:
            what = {
                "recipe_sha256": "another recipe",
                "base_sha256": "another base model",
                "start_sha256": "another start (model, generator or prompts)",
            }.get(key, key)
            raise CheckpointError(f"{folder}: belongs to {what}; resume=never starts over, or give another output")


def _as_written(identity: dict[str, str], manifest: dict[str, Any]) -> dict[str, str]:
    """The identity by the names of the manifest: an earlier version called `base_sha256` what is `start_sha256` now."""
    if "start_sha256" in manifest or "start_sha256" not in identity:
        return identity
    return {"recipe_sha256": identity["recipe_sha256"], "base_sha256": identity["start_sha256"]}


def load_checkpoint(state: TrainState, folder: Path, identity: dict[str, str]) -> None:
    """Restore everything `save_checkpoint` wrote. Raises CheckpointError for another model's or another recipe's checkpoint."""
    check_identity(folder, identity)
    stored = files.read_json(folder / "state.json", error=CheckpointError)
    if isinstance(state, ZeroState):
        read_shards(state, folder, stored["optimizer_steps"])
    else:
        load_network(state.generator, folder / "generator.safetensors")
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
    if isinstance(state, ZeroState):
        write_shard(state, folder, ranks.rank, ranks.world)
        if ranks.is_first:
            files.write_json(folder / "state.json", {"counters": counters, "optimizer_steps": steps_of(state)})
        return
    files.write_tensors(folder / "generator.safetensors", state.generator.state_dict())
    files.write_tensors(folder / "score.safetensors", state.score.state_dict())
    if state.ema is not None:
        files.write_tensors(folder / "ema.safetensors", state.ema)
    groups: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, optimizer in state.optimizers.items():
        groups[name] = pack_optimizer(optimizer, name, tensors)
    files.write_tensors(folder / "optimizers.safetensors", tensors)
    files.write_json(folder / "state.json", {"counters": counters, "optimizers": groups})


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
