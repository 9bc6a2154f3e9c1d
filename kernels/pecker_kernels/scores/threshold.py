"""The exact k-th largest score over any number of tensors and ranks, and the exact keep-set of k weights.

Non-negative float32 values order like their bit patterns. Of very many values a sample first says among which few the answer lies,
and one pass collects those (sampling.py). Then, or where that missed, three passes count the top 11, the next 10 and the last 10 of
the 31 bits; after each pass the bin that holds the k-th largest is known. Counts are integers, so all-reducing them
over the ranks keeps the answer exact and independent of the order. The passes are those of scores.backend.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import PeckerKernelsError, ScoreError
from . import sampling
from .backend import ALL_TIES, NOT_FINITE, SECOND_BITS, THIRD_BITS, Backend, Census, serving


@dataclass(frozen=True)
class Selection:
    """threshold: the k-th largest value. ties: how many values equal it. room: how many of those are kept."""

    threshold: float
    room: int
    ties: int


def _label(names: Sequence[str] | None, i: int) -> str:
    return f"scores of {names[i]!r}" if names is not None else f"tensor {i}"


def refuse_faults(faults: Tensor, names: Sequence[str] | None, negative_too: bool = True, group: Any = None) -> None:
    """Raise ScoreError naming the first tensor that holds NaN or inf, or (negative_too) a negative value.

    With a group every rank raises where one of them must, with the words of the first: a rank left alone would wait for the
    others for ever.
    """
    fault = _first_fault(faults, names, negative_too)
    if group is not None:
        found = torch.tensor(int(fault is not None), device=faults.device)
        torch.distributed.all_reduce(found, group=group)
        if int(found):
            told: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(told, fault, group=group)
            rank, fault = next((rank, text) for rank, text in enumerate(told) if text is not None)
            fault = f"rank {rank}: {fault}"
    if fault is not None:
        raise ScoreError(fault)


def _first_fault(faults: Tensor, names: Sequence[str] | None, negative_too: bool) -> str | None:
    for i, fault in enumerate(faults.tolist()):
        if fault & NOT_FINITE:
            return f"{_label(names, i)} hold NaN or inf: the gradients they come from are not finite"
        if fault and negative_too:
            return f"{_label(names, i)} hold negative values: a threshold is taken over non-negative scores"
    return None


def _summed(counts: Tensor, group: Any) -> list[int]:
    if group is not None:
        counts = counts.clone()
        torch.distributed.all_reduce(counts, group=group)
    return counts.tolist()


def find_digit(counts: Sequence[int], rank: int) -> tuple[int, int]:
    """(bin, rank inside it) of the value with this rank, 1 the largest, in a histogram whose last bin is the
    largest."""
    above = list(accumulate(reversed(counts)))
    assert above[-1] >= rank, "a histogram lost values"
    at = bisect_left(above, rank)
    return len(counts) - 1 - at, rank - (above[at - 1] if at else 0)


def run(
    ops: Backend,
    tensors: Sequence[Tensor],
    k: int,
    group: Any = None,
    names: Sequence[str] | None = None,
    magnitude: bool = False,
    census: Census | None = None,
) -> Selection:
    """`select` by a given implementation; magnitude ranks |value|, census is the first pass where it was taken
    before."""
    for i, t in enumerate(tensors):
        if not t.is_floating_point() or t.dtype == torch.float64:
            raise PeckerKernelsError(f"{_label(names, i)}: dtype {t.dtype} is not ranked exactly in float32")
    if ops.SAMPLED_FROM is not None:
        total = sampling.total_of(tensors, group)
        if total >= ops.SAMPLED_FROM and _is_rank(k, total):
            found = sampling.find(ops, tensors, k, total, group, magnitude)
            refuse_faults(found.faults, names, group=group)
            if found.equal is not None:
                return Selection(found.equal[0], found.rank, found.equal[1])
            if found.tensors is not None:
                return _radix(ops, found.tensors, found.rank, group, True, ops.census(found.tensors, True))
            census = None
    if census is None:
        census = ops.census(tensors, magnitude)
    refuse_faults(census.faults, names, group=group)
    return _radix(ops, tensors, k, group, magnitude, census)


def _is_rank(k: int, total: int) -> bool:
    return isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= total


def _radix(ops: Backend, tensors: Sequence[Tensor], k: int, group: Any, magnitude: bool, census: Census) -> Selection:
    counts = _summed(census.counts, group)
    if not _is_rank(k, sum(counts)):
        raise PeckerKernelsError(f"k must be an integer from 1 to the number of values, {sum(counts)}; got {k}")
    prefix, rank = find_digit(counts, k)
    expected = counts[prefix] if group is None else int(census.counts[prefix])
    second, pool = ops.second_histogram(tensors, magnitude, prefix, expected)
    digit, rank = find_digit(_summed(second, group), rank)
    prefix = (prefix << SECOND_BITS) | digit
    counts = _summed(ops.third_histogram(tensors, magnitude, prefix, pool), group)
    digit, rank = find_digit(counts, rank)
    bits = torch.tensor((prefix << THIRD_BITS) | digit, dtype=torch.int32)
    return Selection(float(bits.view(torch.float32)), rank, counts[digit])


def select(
    tensors: Sequence[Tensor], k: int, group: Any = None, names: Sequence[str] | None = None, impl: str = "auto"
) -> tuple[float, int]:
    """(threshold, ties): the k-th largest value, and how many of the values equal to it belong to the k largest.

    tensors: non-negative finite floating tensors of any shape and device, float64 excepted. group: torch.distributed
    group whose ranks hold disjoint parts of the scores; every rank gets the same answer. impl: "auto" | "triton" |
    "cpu" | "reference". Raises ScoreError for NaN, inf or negative values (naming the tensor), PeckerKernelsError for a
    k outside 1..N.
    """
    tensors = list(tensors)
    found = run(serving(impl, *tensors), tensors, k, group, names)
    return found.threshold, found.room


def kth_largest(tensors: Sequence[Tensor] | Tensor, k: int, group: Any = None, impl: str = "auto") -> float:
    """The exact k-th largest value (k = 1 is the maximum) over all values of all tensors.

    Arguments and errors as in `select`; a single tensor is accepted too.
    """
    return select([tensors] if isinstance(tensors, Tensor) else tensors, k, group, impl=impl)[0]


def _ties_before(ties: list[int], offsets: Sequence[int] | None, group: Any) -> list[int]:
    """For each local tensor, how many values tied at the threshold come earlier in the global flat order."""
    mine = [(offset, count) for offset, count in zip(offsets or range(len(ties)), ties)]
    if group is None:
        table = [((0, *entry), (0, i)) for i, entry in enumerate(mine)]
        here = 0
    else:
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, mine, group=group)
        here = torch.distributed.get_rank(group)
        # Without offsets the ranks hold consecutive stretches, in rank order.
        table = [
            ((0 if offsets is not None else rank, *entry), (rank, i))
            for rank, entries in enumerate(gathered)
            for i, entry in enumerate(entries)
        ]
    before = [0] * len(ties)
    seen = 0
    for (_, _, count), (rank, i) in sorted(table):
        if rank == here:
            before[i] = seen
        seen += count
    return before


def keep_bits(
    ops: Backend,
    tensors: Sequence[Tensor],
    k: int,
    group: Any = None,
    names: Sequence[str] | None = None,
    offsets: Sequence[int] | None = None,
    magnitude: bool = False,
    census: Census | None = None,
) -> tuple[list[Tensor], list[int], float]:
    """(packed bits, ones in each, threshold) of `keep_top_k`; further arguments as in `run`."""
    found = run(ops, tensors, k, group, names, magnitude, census)
    if found.room == found.ties:
        rooms = [ALL_TIES] * len(tensors)
    elif group is None and len(tensors) == 1:
        rooms = [found.room]
    else:
        ties = ops.tie_counts(tensors, magnitude, found.threshold).tolist()
        rooms = [min(max(found.room - before, 0), n) for n, before in zip(ties, _ties_before(ties, offsets, group))]
    bits, counts, _ = ops.keep_bits(tensors, magnitude, found.threshold, rooms)
    return bits, counts.tolist(), found.threshold


def keep_top_k(
    tensors: Sequence[Tensor],
    k: int,
    group: Any = None,
    names: Sequence[str] | None = None,
    offsets: Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[list[Tensor], float]:
    """(bool tensors of the same shapes, threshold): exactly the k largest values over all tensors and ranks.

    Equal values are decided by the lowest flat index, counted through the tensors in order. With `group`, `offsets`
    gives the global flat index of each local tensor's first value; without offsets rank 0 comes first, then rank 1, and
    so on. Further arguments and errors as in `select`.
    """
    tensors = list(tensors)
    bits, _, threshold = keep_bits(serving(impl, *tensors), tensors, k, group, names, offsets)
    return [reference.unpack_bits(b, t.numel()).view(t.shape) for b, t in zip(bits, tensors)], threshold
