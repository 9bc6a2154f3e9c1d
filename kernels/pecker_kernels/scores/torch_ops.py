"""Scoring and selection in torch, on any device; see scores.backend.Backend for every function.

Extra memory of a histogram: one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .backend import (
    ALL_TIES,
    FIRST_BITS,
    FIRST_SHIFT,
    NEGATIVE,
    NOT_FINITE,
    SAMPLE_BLOCK,
    SECOND_BITS,
    SECOND_SHIFT,
    Census,
)
from .backend import grid as grid_of

CHUNK = 1 << 22
SAMPLED_FROM: int | None = None
_INFINITY = 0x7F800000  # NaN lies above


def _chunks(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 values, their int32 keys), a bounded number at a time."""
    for part in map(Tensor.float, tensor.detach().reshape(-1).split(CHUNK)):
        yield part, part.view(torch.int32) & 0x7FFFFFFF


def _home(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _zeros(tensors: Sequence[Tensor], n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(n, dtype=dtype, device=_home(tensors))


def accumulate_(
    scores: Sequence[Tensor], grads: Sequence[Tensor | None], reduction: str, census: bool
) -> Census | None:
    pairs = [(s, g if g.dtype == torch.float32 else g.float()) for s, g in zip(scores, grads) if g is not None]
    if pairs:
        into, add = [s for s, _ in pairs], [g for _, g in pairs]
        if reduction == "sum":
            torch._foreach_add_(into, add)
        elif reduction == "abs":
            torch._foreach_add_(into, torch._foreach_abs(add))
        else:
            torch._foreach_addcmul_(into, add, add)
    return _take_census(scores, reduction == "sum") if census else None


def rms_sums(square_sums: Sequence[Tensor], count: int) -> Tensor:
    sums = [(s / count).sqrt_().sum(dtype=torch.float64).to(_home(square_sums)) for s in square_sums]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def contrast_(
    scores: Sequence[Tensor], square_sums: Sequence[Tensor], count: int, floor_value: float, magnitude: bool
) -> Census:
    for score, squares in zip(scores, square_sums):
        if magnitude:
            score.abs_()
        score.div_((squares / count).sqrt_().add_(floor_value))
    return _take_census(scores, magnitude)


def census(tensors: Sequence[Tensor], magnitude: bool) -> Census:
    counts = _zeros(tensors, 1 << FIRST_BITS)
    faults = _zeros(tensors, len(tensors), torch.uint8)
    for i, tensor in enumerate(tensors):
        for values, keys in _chunks(tensor):
            counts += torch.bincount(keys >> FIRST_SHIFT, minlength=1 << FIRST_BITS).to(counts.device)
            if keys.numel():
                wild = (keys.max() >= _INFINITY) * NOT_FINITE
                below_zero = (values.min() < 0) * NEGATIVE * (not magnitude)
                faults[i] |= (wild | below_zero).to(faults.device, torch.uint8)
    return Census(counts, faults)


_take_census = census  # `census` is an argument of accumulate_


def _hashed(x: Tensor) -> Tensor:
    """int64 in [0, 2^32) -> the same: every bit of x moves half of the bits of the result."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def sample(tensors: Sequence[Tensor], per: int) -> Tensor:
    """One key of each of `per` equal stretches of every block, at a hashed place."""
    found, stretch = [_zeros(tensors, 0, torch.int32)], SAMPLE_BLOCK // per
    for i, tensor in enumerate(tensors):
        blocks = -(-tensor.numel() // SAMPLE_BLOCK)
        places = torch.arange(blocks * per, device=tensor.device)
        at = places * stretch + _hashed((i * 0x9E3779B1 + places) & 0xFFFFFFFF) % stretch
        live = at < tensor.numel()
        keys = tensor.detach().reshape(-1)[at[live]].float().view(torch.int32) & 0x7FFFFFFF
        found.append(torch.full_like(at, -1, dtype=torch.int32).masked_scatter_(live, keys).to(_home(tensors)))
    return torch.cat(found)


def bracket(
    tensors: Sequence[Tensor], magnitude: bool, bounds: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One region, which takes `capacity` keys."""
    above, filled = _zeros(tensors, 1), _zeros(tensors, 1)
    pool = torch.empty(1, capacity, dtype=torch.int32, device=_home(tensors))
    for tensor in tensors:
        for _, keys in _chunks(tensor):
            lower, upper = bounds.to(keys.device)
            above += (keys > upper).sum().to(above.device)
            inside, first = keys[(keys >= lower) & (keys <= upper)], int(filled)
            stored = inside[: max(capacity - first, 0)]
            pool[0, first : first + len(stored)] = stored.to(pool.device)
            filled += len(inside)
    return above, filled, pool, census(tensors, magnitude).faults


def _digit_histogram(tensors: Sequence[Tensor], prefix: int, shift: int, bits: int) -> Tensor:
    total = _zeros(tensors, 1 << bits)
    for tensor in tensors:
        for _, keys in _chunks(tensor):
            chosen = keys[(keys >> (shift + bits)) == prefix]
            total += torch.bincount((chosen >> shift) & ((1 << bits) - 1), minlength=1 << bits).to(total.device)
    return total


def second_histogram(tensors: Sequence[Tensor], magnitude: bool, prefix: int, expected: int) -> tuple[Tensor, Any]:
    return _digit_histogram(tensors, prefix, SECOND_SHIFT, SECOND_BITS), None


def third_histogram(tensors: Sequence[Tensor], magnitude: bool, prefix: int, pool: Any) -> Tensor:
    return _digit_histogram(tensors, prefix, 0, SECOND_SHIFT)


def _values(tensor: Tensor, magnitude: bool) -> Tensor:
    return tensor.detach().abs() if magnitude else tensor.detach()


def tie_counts(tensors: Sequence[Tensor], magnitude: bool, threshold: float) -> Tensor:
    ties = _zeros(tensors, len(tensors))
    for i, t in enumerate(tensors):
        ties[i] = (_values(t, magnitude) == threshold).sum()
    return ties


def keep_bits(
    tensors: Sequence[Tensor], magnitude: bool, threshold: float, rooms: Sequence[int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    bits: list[Tensor] = []
    counts, faults = _zeros(tensors, len(tensors)), _zeros(tensors, len(tensors), torch.uint8)
    for i, (tensor, room) in enumerate(zip(tensors, rooms)):
        values = _values(tensor, magnitude).reshape(-1)
        if room == ALL_TIES:
            keep = values >= threshold
        else:
            keep = values > threshold
            if room:
                keep[(values == threshold).nonzero().view(-1)[:room]] = True
        counts[i] = keep.sum()
        faults[i] = ~values.isfinite().all() * NOT_FINITE + (values < 0).any() * NEGATIVE
        bits.append(reference.pack_bits(keep))
    return bits, counts, faults


def block_sums(tensor: Tensor, height: int, width: int, magnitude: bool) -> Tensor:
    values = _values(tensor, magnitude).reshape(grid_of(tensor.shape)).double()
    for dim, size in ((0, height), (1, width)):
        if size == 1:
            continue
        edge = -values.shape[dim] % size
        if edge:
            values = torch.nn.functional.pad(values, (0, edge) if dim else (0, 0, 0, edge))
        values = values.unflatten(dim, (-1, size)).sum(dim=dim + 1)
    return values.reshape(-1)


def block_bits(kept: Tensor, shape: Sequence[int], height: int, width: int) -> Tensor:
    rows, columns = grid_of(shape)
    matrix = kept.view(-(-rows // height), -(-columns // width))
    matrix = matrix.repeat_interleave(height, 0)[:rows] if height > 1 else matrix
    matrix = matrix.repeat_interleave(width, 1)[:, :columns] if width > 1 else matrix
    return reference.pack_bits(matrix.reshape(-1).contiguous())
