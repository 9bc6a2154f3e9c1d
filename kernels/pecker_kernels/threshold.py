"""The exact k-th largest score over any number of tensors and ranks, and the exact keep-set of k weights.

Non-negative float32 values order like their bit patterns. Three passes count the top 11, the next 10 and the last 10 of
the 31 bits; after each pass the bin that holds the k-th largest is known. Counts are integers, so all-reducing them
over the ranks keeps the answer exact and independent of the order. Extra memory: one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import PeckerKernelsError, ScoreError

CHUNK = 1 << 22
_PASSES = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of each digit, most significant first
_FIRST_NON_FINITE = 0x7F800000 >> 20  # top 11 bits of inf; NaN lies above


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's values as int32 bit patterns, a bounded number at a time."""
    flat = tensor.detach().reshape(-1)
    for part in flat.split(CHUNK):
        # + 0.0 turns -0.0 into +0.0, whose pattern is the smallest.
        yield (part.float() + 0.0).view(torch.int32)


def _label(names: Sequence[str] | None, i: int) -> str:
    return f"scores of {names[i]!r}" if names is not None else f"tensor {i}"


def _first_histogram(tensor: Tensor, label: str) -> Tensor:
    """int64 [2048] counts of the top 11 bits; the same pass finds values that have no place in a ranking."""
    shift, bits = _PASSES[0]
    total = torch.zeros(2 << bits, dtype=torch.int64, device=tensor.device)
    for keys in _chunks(tensor):
        # An arithmetic shift keeps the sign: negative values land in the lower half.
        total += torch.bincount((keys >> shift) + (1 << bits), minlength=2 << bits)
    negative, counts = total[: 1 << bits], total[1 << bits :]
    bad = torch.stack([negative.sum(), counts[_FIRST_NON_FINITE:].sum()]).tolist()
    if bad[1] or (bad[0] and not bool(tensor.isfinite().all())):
        raise ScoreError(f"{label} hold NaN or inf: the gradients they come from are not finite")
    if bad[0]:
        raise ScoreError(f"{label} hold negative values: a threshold is taken over non-negative scores")
    return counts


def _digit_histogram(tensor: Tensor, prefix: int, shift: int, bits: int) -> Tensor:
    """int64 [2**bits] counts of one digit among the values whose higher bits equal `prefix`."""
    total = torch.zeros(1 << bits, dtype=torch.int64, device=tensor.device)
    for keys in _chunks(tensor):
        chosen = keys[(keys >> (shift + bits)) == prefix]
        total += torch.bincount((chosen >> shift) & ((1 << bits) - 1), minlength=1 << bits)
    return total


def _summed(histograms: list[Tensor], group: Any, length: int, device: torch.device) -> list[int]:
    total = torch.zeros(length, dtype=torch.int64, device=device)
    for histogram in histograms:
        total += histogram.to(device)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.tolist()


def select(
    tensors: Sequence[Tensor], k: int, group: Any = None, names: Sequence[str] | None = None
) -> tuple[float, int]:
    """(threshold, ties): the k-th largest value, and how many of the values equal to it belong to the k largest.

    tensors: non-negative finite floating tensors of any shape and device, float64 excepted. group: torch.distributed
    group whose ranks hold disjoint parts of the scores; every rank gets the same answer. Raises ScoreError for NaN, inf
    or negative values (naming the tensor), PeckerKernelsError for a k outside 1..N.
    """
    tensors = list(tensors)
    for i, t in enumerate(tensors):
        if not t.is_floating_point() or t.dtype == torch.float64:
            raise PeckerKernelsError(f"{_label(names, i)}: dtype {t.dtype} is not ranked exactly in float32")
    device = tensors[0].device if tensors else torch.device("cpu")
    counts = _summed(
        [_first_histogram(t, _label(names, i)) for i, t in enumerate(tensors)], group, 1 << _PASSES[0][1], device
    )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= sum(counts):
        raise PeckerKernelsError(f"k must be an integer from 1 to the number of values, {sum(counts)}; got {k}")
    prefix, rank = 0, k
    for level, (shift, bits) in enumerate(_PASSES):
        if level:
            counts = _summed([_digit_histogram(t, prefix, shift, bits) for t in tensors], group, 1 << bits, device)
        assert sum(counts) >= rank, "a histogram lost values"
        digit = (1 << bits) - 1
        while rank > counts[digit]:
            rank -= counts[digit]
            digit -= 1
        prefix = (prefix << bits) | digit
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32)), rank


def kth_largest(tensors: Sequence[Tensor] | Tensor, k: int, group: Any = None) -> float:
    """The exact k-th largest value (k = 1 is the maximum) over all values of all tensors.

    Arguments and errors as in `select`; a single tensor is accepted too.
    """
    return select([tensors] if isinstance(tensors, Tensor) else tensors, k, group)[0]


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


def keep_top_k(
    tensors: Sequence[Tensor],
    k: int,
    group: Any = None,
    names: Sequence[str] | None = None,
    offsets: Sequence[int] | None = None,
) -> tuple[list[Tensor], float]:
    """(bool tensors of the same shapes, threshold): exactly the k largest values over all tensors and ranks.

    Equal values are decided by the lowest flat index, counted through the tensors in order. With `group`, `offsets`
    gives the global flat index of each local tensor's first value; without offsets rank 0 comes first, then rank 1, and
    so on.
    """
    tensors = list(tensors)
    threshold, room = select(tensors, k, group, names)
    equal = [t == threshold for t in tensors]
    ties = [int(e.sum()) for e in equal]
    keep = []
    for t, e, count, before in zip(tensors, equal, ties, _ties_before(ties, offsets, group)):
        take = min(max(room - before, 0), count)
        kept = t > threshold
        if take == count:
            kept |= e
        elif take:
            # The flat view of a fresh contiguous tensor: row-major whatever the strides of the scores.
            kept = kept.contiguous()
            kept.view(-1)[e.reshape(-1).nonzero().view(-1)[:take]] = True
        keep.append(kept)
    return keep, threshold
