"""Where the k-th largest score lies, by a sample: a few thousand keys around it instead of billions.

The sample is sorted; the k-th largest of all values lies, but for one case in a million, between two of its keys that are a few
standard deviations of its rank apart. One pass over the scores counts what is above and collects what is between. Whether the
k-th is among it is then known, not likely: if it is not, or too many are (a few values taken by most), the caller selects
without a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import SAMPLE_BLOCK, Backend

SAMPLES = 1 << 20  # about so many are drawn, of fewer than 16 values each one in 16
DEVIATIONS = 5.0
POOL_SHARE = 1 / 32  # of the values, for what is between the bounds; a few per thousand are expected
POOL_LEAST = 4096
LARGEST_KEY = 0x7F7FFFFF


@dataclass(frozen=True)
class Bracket:
    """tensors: float32 scores, all of them ≥ 0, among which the wanted one has this rank, 1 the largest; None where it is not
    known to be among them. equal: (value, how many have it over all ranks) where those among which it is are all alike.
    faults: as in Census."""

    tensors: list[Tensor] | None
    rank: int
    faults: Tensor
    equal: tuple[float, int] | None = None


def total_of(tensors: Sequence[Tensor], group: Any) -> int:
    """Values over all ranks."""
    n = sum(t.numel() for t in tensors)
    if group is None:
        return n
    count = torch.tensor(n, dtype=torch.int64, device=_home(tensors))
    torch.distributed.all_reduce(count, group=group)
    return int(count)


def find(ops: Backend, tensors: Sequence[Tensor], k: int, total: int, group: Any, magnitude: bool) -> Bracket:
    """The scores between two bounds around the k-th largest of `total` over all ranks, 1 ≤ k ≤ total. Ranks decide alike."""
    bounds = _bounds(_sampled(ops, tensors, total, group), k / total)
    room = int(sum(t.numel() for t in tensors) * POOL_SHARE) + POOL_LEAST
    above, filled, pool, faults = ops.bracket(tensors, magnitude, bounds, room)
    fills = filled.to(torch.int64)
    counts = torch.cat([above, fills.sum(0, keepdim=True), (fills > pool.shape[1]).any(0, keepdim=True)])
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    higher, between, missed, lower, upper = torch.cat([counts, bounds]).tolist()
    if higher < k <= higher + between and lower == upper:
        value = torch.tensor(lower, dtype=torch.int32).view(torch.float32)
        return Bracket(None, k - higher, faults, (float(value), between))
    if not higher < k <= higher + between or missed:
        return Bracket(None, k, faults)
    scores = pool.view(torch.float32)
    return Bracket([scores[i, :n] for i, n in enumerate(fills.tolist())], k - higher, faults)


def _home(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _sampled(ops: Backend, tensors: Sequence[Tensor], total: int, group: Any) -> Tensor:
    """int32 keys of all ranks, -1 where there was none."""
    per = 1 << min(max(round(math.log2(SAMPLES * SAMPLE_BLOCK / total)), 0), round(math.log2(SAMPLE_BLOCK / 16)))
    keys = ops.sample(tensors, per)
    if group is None:
        return keys
    length = torch.tensor(len(keys), dtype=torch.int64, device=keys.device)
    torch.distributed.all_reduce(length, torch.distributed.ReduceOp.MAX, group=group)
    keys = torch.nn.functional.pad(keys, (0, int(length) - len(keys)), value=-1)
    gathered = [torch.empty_like(keys) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, keys, group=group)
    return torch.cat(gathered)


def _bounds(keys: Tensor, share: float) -> Tensor:
    """int32 [2]: two keys between which the value that `share` of all values reach lies in all but very few samples. Nothing of it
    waits for the device."""
    ordered = keys.sort(descending=True).values
    drawn = (keys >= 0).sum().double()
    # the rank of the wanted one in the sample, and how far off it is likely to be: ≥ 1, for the discreteness of ranks
    rank, spread = drawn * share, DEVIATIONS * (drawn * share * (1 - share)).sqrt() + DEVIATIONS
    ends = torch.stack([rank + spread, rank - spread])
    at = ends.clamp(0, len(keys) - 1).long()
    found = ordered[at] if len(keys) else torch.zeros(2, dtype=torch.int32, device=keys.device)
    lower = torch.where(ends[0] < drawn, found[0], 0)
    upper = torch.where(ends[1] >= 0, found[1], LARGEST_KEY)
    return torch.stack([lower, upper]).to(torch.int32)
