"""Checkpoints of a run on many ranks: every rank writes its own vectors, any number of ranks reads them.

shard-00001-of-00004.safetensors
    generator/weights  score/weights  generator/ema     float32, the rank's vectors
    OPTIMIZER/exp_avg_sq  OPTIMIZER/exp_avg             moments, compact where the optimizer's are
    metadata: which elements of which tensors the vectors hold
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pecker_kernels import MaskedAdam, Piece, SaliencyMask, Shards
from pecker_kernels.mask.bits import unpack_bits
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor

from pecker_fast import files
from pecker_fast.engine.zero import ZeroState
from pecker_fast.errors import CheckpointError

NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")
MOMENTS = ("exp_avg_sq", "exp_avg")


@dataclass
class Wanted:
    """A vector to be filled: `key` in the files, laid out there as `network` is."""

    key: str
    network: str
    layout: Shards
    vector: Tensor
    mask: SaliencyMask | None = None  # of moments that may be compact in the files


def write_shard(state: ZeroState, folder: Path, rank: int, world: int) -> None:
    """This rank's file."""
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    for name, network in state.networks.items():
        layouts[name] = _layout_of(network.shards)
        tensors[f"{name}/weights"] = network.partition.detach()
        for optimizer_name, optimizer in state.optimizers_of(name).items():
            moments = optimizer.state.get(network.partition, {})
            tensors |= {f"{optimizer_name}/{key}": moments[key] for key in MOMENTS if key in moments}
    if state.ema is not None:
        tensors["generator/ema"] = state.ema[PARTITION]
    path = folder / f"shard-{rank:05d}-of-{world:05d}.safetensors"
    files.write_tensors(path, tensors, {"layouts": json.dumps(layouts)})


def steps_of(state: ZeroState) -> dict[str, float]:
    """Steps each optimizer has taken."""
    taken = {}
    for name, network in state.networks.items():
        for optimizer_name, optimizer in state.optimizers_of(name).items():
            moments = optimizer.state.get(network.partition, {})
            taken[optimizer_name] = float(moments["step"]) if "step" in moments else 0.0
    return taken


def read_shards(state: ZeroState, folder: Path, steps: Mapping[str, float]) -> None:
    """Fill the state from a checkpoint of any number of ranks. Raises CheckpointError. Takes all ranks."""
    wanted: list[Wanted] = []
    moments: list[tuple[MaskedAdam, float, dict[str, Tensor]]] = []
    with torch.no_grad():
        for name, network in state.networks.items():
            wanted.append(Wanted(f"{name}/weights", name, network.shards, network.partition.detach()))
            for optimizer_name, optimizer in state.optimizers_of(name).items():
                if not steps[optimizer_name]:
                    continue
                mask = state.mask if name == "generator" and optimizer.mask is not None else None
                keys = MOMENTS if optimizer.param_groups[0]["betas"][0] else MOMENTS[:1]
                vectors = {key: torch.zeros(network.shards.length, device=network.partition.device) for key in keys}
                wanted += [Wanted(f"{optimizer_name}/{k}", name, network.shards, v, mask) for k, v in vectors.items()]
                moments.append((optimizer, steps[optimizer_name], vectors))
        if state.ema is not None:
            wanted.append(
                Wanted("generator/ema", "generator", state.networks["generator"].shards, state.ema[PARTITION])
            )
        fill(folder, wanted)
        for optimizer, taken, vectors in moments:
            packed = optimizer.state_dict()
            packed["state"] = {0: {"step": torch.tensor(taken), **vectors}}
            optimizer.load_state_dict(packed)
        for network in state.networks.values():
            network.publish()


def read_generator(folder: Path, shapes: Mapping[str, torch.Size], kind: str) -> dict[str, Tensor]:
    """{name: float32 weights} of the whole generator; kind: "weights" or "ema". Raises CheckpointError."""
    pieces, first = [], 0
    for name, shape in shapes.items():
        pieces.append(Piece(name, 0, shape.numel(), first))
        first += shape.numel()
    layout = Shards(shapes, pieces, first)
    vector = torch.zeros(first)
    fill(folder, [Wanted(f"generator/{kind}", "generator", layout, vector)])
    return {piece.name: layout.view(vector, piece).view(shapes[piece.name]) for piece in pieces}


def fill(folder: Path, wanted: list[Wanted]) -> None:
    """Copy what the files hold into the vectors. Raises CheckpointError where an element is nowhere to be found."""
    missing = {id(want): sum(piece.numel for piece in want.layout.pieces) for want in wanted}
    for tensors, layouts in _files(folder):
        for want in wanted:
            if want.key not in tensors:
                raise CheckpointError(f"{folder}: {want.key} is not in the checkpoint")
            there = _layout(layouts[want.network], want.layout.shapes)
            values = _expanded(tensors[want.key], there, want.mask)
            for piece in there.pieces:
                for mine in want.layout.pieces_of(piece.name):
                    start, stop = max(piece.start, mine.start), min(piece.stop, mine.stop)
                    if start < stop:
                        at, source = mine.offset + start - mine.start, piece.offset + start - piece.start
                        want.vector[at : at + stop - start] = values[source : source + stop - start]
                        missing[id(want)] -= stop - start
    for want in wanted:
        if missing[id(want)]:
            raise CheckpointError(
                f"{folder}: {missing[id(want)]} elements of {want.key} are in no file of the checkpoint"
            )


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint folder is of a run on ranks."""
    return any(NAME.fullmatch(path.name) for path in folder.iterdir())


def _files(folder: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    for name in names:
        tensors, metadata = files.read_tensors(folder / name, error=CheckpointError)
        try:
            layouts = json.loads(metadata["layouts"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{folder / name}: does not say what it holds") from error
        yield tensors, layouts


def _layout_of(shards: Shards) -> dict[str, Any]:
    return {"length": shards.length, "pieces": [[p.name, p.start, p.stop, p.offset] for p in shards.pieces]}


def _layout(stored: dict[str, Any], shapes: Mapping[str, torch.Size]) -> Shards:
    return Shards(shapes, [Piece(*fields) for fields in stored["pieces"]], stored["length"])


def _expanded(values: Tensor, layout: Shards, mask: SaliencyMask | None) -> Tensor:
    """Moments of the whole vector; those of weights the mask leaves out are zero."""
    if values.numel() == layout.length or mask is None:
        return values
    whole = torch.zeros(layout.length)
    whole[unpack_bits(layout.cut(mask).bits[PARTITION], layout.length)] = values
    return whole
