"""Live output channels of one weight."""

from __future__ import annotations

import torch
from torch import Tensor


def pick(t: Tensor, dim: int, chosen: slice | Tensor) -> Tensor:
    """Entries of one dimension: a view for a slice, else a copy. Channels of a channels-last tensor stay the innermost
    ones, where a plain index_select would write them outermost."""
    if isinstance(chosen, slice):
        return t.narrow(dim, chosen.start, chosen.stop - chosen.start)
    if dim == 1 and t.dim() > 2 and t.stride(1) == 1:
        return t.movedim(1, -1).index_select(-1, chosen).movedim(-1, 1)
    return t.index_select(dim, chosen)


def choice(positions: Tensor) -> slice | Tensor:
    """Ascending int64 [n > 0] -> the slice they fill without a gap, else themselves; waits for the device."""
    first, last, n = int(positions[0]), int(positions[-1]), positions.numel()
    return slice(first, last + 1) if last - first + 1 == n else positions


def live_rows(keep: Tensor) -> Tensor:
    """bool [rows, columns] -> int64, the rows with a live weight."""
    return keep.any(dim=1).nonzero().view(-1)


def to_device(chosen: slice | Tensor, device: torch.device) -> slice | Tensor:
    return chosen if isinstance(chosen, slice) else chosen.to(device)
