"""Scoring and selection on the GPU; see scores.backend.Backend for every function.

Nothing here waits for the device. Strided scores and gradients are copied in row-major order first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..scores.backend import FIRST_BITS, SECOND_SHIFT, Census
from . import blocks, keep, saliency, threshold
from . import bracket as bracketing
from .table import on_device_of

# 27 instructions a value instead of 164; for fewer values launches take longer than the work.
SAMPLED_FROM = 1 << 22


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().contiguous() for t in tensors]


def _blank(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(replicated counts, int32 faults) for the kernels to add to."""
    device = _device(tensors)
    return threshold.shared_counts(1 << FIRST_BITS, device), torch.zeros(len(tensors), dtype=torch.int32, device=device)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _is_sampled(scores: Sequence[Tensor]) -> bool:
    """Whether no selection of so many will look at a census."""
    return sum(s.numel() for s in scores) >= SAMPLED_FROM


def _census(counts: Tensor, faults: Tensor) -> Census:
    return Census(counts.sum(0), faults.to(torch.uint8))


def accumulate_(
    scores: Sequence[Tensor], grads: Sequence[Tensor | None], reduction: str, census: bool
) -> Census | None:
    counts, faults = _blank(scores)
    given: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for i, grad in enumerate(grads):
        if grad is not None and grad.numel():
            ready = (grad.float() if grad.dtype == torch.float64 else grad).detach().contiguous()
            given.setdefault(ready.dtype, []).append((i, ready))
    census = census and not _is_sampled(scores)
    with on_device_of(scores):
        for pairs in given.values():
            places = [i for i, _ in pairs]
            into = [scores[i] for i in places]
            saliency.accumulate(into, [g for _, g in pairs], reduction, counts, faults, census, places)
            torch.autograd.graph.increment_version(into)
        if not census:
            return None
        rest = [i for i, grad in enumerate(grads) if grad is None]
        threshold.add_census([scores[i] for i in rest], reduction == "sum", counts, faults, rest)
        return _census(counts, faults)


def rms_sums(square_sums: Sequence[Tensor], count: int) -> Tensor:
    if not any(s.numel() for s in square_sums):
        return torch.zeros(len(square_sums), dtype=torch.float64, device=_device(square_sums))
    with on_device_of(square_sums):
        return saliency.rms_sums(square_sums, count)


def contrast_(
    scores: Sequence[Tensor], square_sums: Sequence[Tensor], count: int, floor_value: float, magnitude: bool
) -> Census | None:
    counts, faults = _blank(scores)
    census = not _is_sampled(scores)
    if any(s.numel() for s in scores):
        with on_device_of(scores):
            saliency.contrast(scores, square_sums, count, floor_value, magnitude, counts, faults, census)
        torch.autograd.graph.increment_version(scores)
    return _census(counts, faults) if census else None


def census(tensors: Sequence[Tensor], magnitude: bool) -> Census:
    counts, faults = _blank(tensors)
    with on_device_of(tensors):
        threshold.add_census(_plain(tensors), magnitude, counts, faults, range(len(tensors)))
    return _census(counts, faults)


def sample(tensors: Sequence[Tensor], per: int) -> Tensor:
    if not any(t.numel() for t in tensors):
        return torch.zeros(0, dtype=torch.int32, device=_device(tensors))
    with on_device_of(tensors):
        return bracketing.sample(_plain(tensors), per)


def bracket(
    tensors: Sequence[Tensor], magnitude: bool, bounds: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = _device(tensors)
    if not any(t.numel() for t in tensors):
        none = torch.zeros(1, dtype=torch.int64, device=device)
        faults = torch.zeros(len(tensors), dtype=torch.uint8, device=device)
        return none, none, torch.zeros(1, 1, dtype=torch.int32, device=device), faults
    with on_device_of(tensors):
        above, filled, pool, faults = bracketing.bracket(_plain(tensors), magnitude, bounds, capacity)
    return above, filled, pool, faults.to(torch.uint8)


def second_histogram(
    tensors: Sequence[Tensor], magnitude: bool, prefix: int, expected: int
) -> tuple[Tensor, Tensor | None]:
    total = sum(t.numel() for t in tensors)
    if not total:
        return torch.zeros(1 << threshold.SECOND_BITS, dtype=torch.int64, device=_device(tensors)), None
    pool = None
    if expected <= threshold.POOL_SHARE * total:
        pool = torch.empty(expected, dtype=torch.int32, device=tensors[0].device)
    with on_device_of(tensors):
        return threshold.digit_counts(_plain(tensors), prefix, SECOND_SHIFT, pool), pool


def third_histogram(tensors: Sequence[Tensor], magnitude: bool, prefix: int, pool: Tensor | None) -> Tensor:
    # Keys are patterns of float32 values, so a pool is one more tensor of scores.
    sources = [pool.view(torch.float32)] if pool is not None and pool.numel() else _plain(tensors)
    if not any(t.numel() for t in sources):
        return torch.zeros(1 << threshold.SECOND_BITS, dtype=torch.int64, device=_device(tensors))
    with on_device_of(sources):
        return threshold.digit_counts(sources, prefix, 0, None)


def tie_counts(tensors: Sequence[Tensor], magnitude: bool, threshold: float) -> Tensor:
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    with on_device_of(tensors):
        return keep.tie_counts(_plain(tensors), magnitude, threshold)


def keep_bits(
    tensors: Sequence[Tensor], magnitude: bool, threshold: float, rooms: Sequence[int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    if not tensors:
        return [], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
    with on_device_of(tensors):
        bits, counts, faults = keep.keep_bits(_plain(tensors), magnitude, threshold, rooms)
    return bits, counts, faults.to(torch.uint8)


def block_sums(tensor: Tensor, height: int, width: int, magnitude: bool) -> Tensor:
    with on_device_of([tensor]):
        return blocks.block_sums(tensor.detach().contiguous(), height, width, magnitude)


def block_bits(kept: Tensor, shape: Sequence[int], height: int, width: int) -> Tensor:
    with on_device_of([kept]):
        return blocks.block_bits(kept.contiguous(), shape, height, width)
