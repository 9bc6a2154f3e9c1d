"""Which weights a mask keeps: element, row, tile and tensor structures, globally or per tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import threshold as radix
from .errors import MaskError, ScoreError

STRUCTURES = ("element", "row", "tile", "tensor")
SCOPES = ("global", "tensor")


def check_choice(structure: str, scope: str, tile: Sequence[int]) -> None:
    """Raise MaskError for an unknown structure or scope, or a tile that is not two positive integers."""
    if structure not in STRUCTURES:
        raise MaskError(f"unknown structure {structure!r}: choose from {', '.join(STRUCTURES)}")
    if scope not in SCOPES:
        raise MaskError(f"unknown scope {scope!r}: choose from {', '.join(SCOPES)}")
    if len(tile) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in tile):
        raise MaskError(f"tile must be two positive integers, got {tile}")


def _grid(shape: torch.Size, structure: str, tile: Sequence[int]) -> tuple[int, int, int, int]:
    """(rows, columns, block height, block width) of the view [shape[0], rest]."""
    rows = int(shape[0]) if len(shape) else 1
    columns = int(torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1
    height, width = {"row": (1, columns), "tile": (tile[0], tile[1]), "tensor": (rows, columns)}[structure]
    return rows, columns, max(height, 1), max(width, 1)


def _block_sums(values: Tensor, height: int, width: int) -> Tensor:
    """Sums over the blocks of a matrix [rows, columns] -> [blocks down, blocks across]; edges ragged."""
    for dim, size in ((0, height), (1, width)):
        if size == 1:
            continue
        edge = -values.shape[dim] % size
        if edge:
            values = torch.nn.functional.pad(values, (0, edge) if dim else (0, 0, 0, edge))
        values = values.unflatten(dim, (-1, size)).sum(dim=dim + 1)
    return values


def _block_sizes(rows: int, columns: int, height: int, width: int) -> Tensor:
    """int64 number of weights in each block, flat."""
    down = torch.tensor([min(height, rows - top) for top in range(0, rows, height)], dtype=torch.int64)
    across = torch.tensor([min(width, columns - left) for left in range(0, columns, width)], dtype=torch.int64)
    return (down.view(-1, 1) * across).view(-1)


def _spread(kept: Tensor, shape: torch.Size, grid: tuple[int, int, int, int]) -> Tensor:
    """bool per block -> bool per weight."""
    rows, columns, height, width = grid
    matrix = kept.view(-(-rows // height), -(-columns // width))
    matrix = matrix.repeat_interleave(height, 0)[:rows] if height > 1 else matrix
    matrix = matrix.repeat_interleave(width, 1)[:, :columns] if width > 1 else matrix
    return matrix.reshape(shape)


def random_scores(shape: torch.Size, structure: str, tile: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent uniform scores of a tensor's shape, one draw per block: a mean of many draws would favour small
    blocks."""
    if structure == "element" or not shape.numel():
        return torch.rand(shape, generator=generator)
    rows, columns, height, width = _grid(shape, structure, tile)
    draws = torch.rand(-(-rows // height), -(-columns // width), generator=generator)
    draws = draws.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return draws.reshape(shape)


def _best_blocks(
    tensors: Sequence[Tensor],
    names: Sequence[str],
    k: int | None,
    cut: float | None,
    structure: str,
    tile: Sequence[int],
) -> tuple[list[Tensor], float | None]:
    """Blocks by mean score: the best until k weights are covered, or all at or above `cut`."""
    live = [(i, t, _grid(t.shape, structure, tile)) for i, t in enumerate(tensors) if t.numel()]
    means, sizes = [], []
    for i, t, (rows, columns, height, width) in live:
        size = _block_sizes(rows, columns, height, width)
        mean = _block_sums(t.reshape(rows, columns).double(), height, width).reshape(-1).cpu() / size
        if not bool(mean.isfinite().all()):
            raise ScoreError(f"scores of {names[i]!r} hold NaN or inf: the gradients they come from are not finite")
        means.append(mean)
        sizes.append(size)
    if not means:
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in tensors], None
    mean, size = torch.cat(means), torch.cat(sizes)
    reached: float | None
    if cut is not None:
        kept, reached = mean >= cut, cut
    else:
        assert k is not None
        # A stable sort leaves equal means in the order of the blocks.
        order = mean.sort(descending=True, stable=True).indices
        needed = int((size[order].cumsum(0) < k).sum()) + 1 if k else 0
        kept = torch.zeros(len(mean), dtype=torch.bool)
        kept[order[:needed]] = True
        reached = float(mean[order[needed - 1]]) if needed else None
    out = [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    for (i, t, grid), part in zip(live, kept.split([len(m) for m in means])):
        out[i] = _spread(part, t.shape, grid).to(t.device)
    return out, reached


def _at_or_above(tensors: Sequence[Tensor], names: Sequence[str], cut: float) -> list[Tensor]:
    for name, t in zip(names, tensors):
        if not bool(t.isfinite().all()):
            raise ScoreError(f"scores of {name!r} hold NaN or inf: the gradients they come from are not finite")
    return [t >= cut for t in tensors]


def _check_amount(density: float | None, threshold: float | None, scope: str) -> None:
    if (density is None) == (threshold is None):
        raise MaskError("give exactly one of density and threshold")
    if density is not None and not 0.0 < density <= 1.0:
        raise MaskError(f"density must be in (0, 1], got {density}")
    if threshold is not None:
        if not (math.isfinite(threshold) and threshold >= 0):
            raise MaskError(f"threshold must be a finite number ≥ 0, got {threshold}")
        if scope == "tensor":
            raise MaskError(
                "scope='tensor' gives each tensor its own threshold: it goes with density, not with threshold"
            )


def choose(
    tensors: Sequence[Tensor],
    names: Sequence[str],
    *,
    density: float | None,
    threshold: float | None,
    scope: str,
    structure: str,
    tile: Sequence[int],
    group: Any = None,
) -> tuple[list[Tensor], float | None]:
    """(bool tensors, threshold reached); rules and errors as in SaliencyMask.from_scores."""
    check_choice(structure, scope, tile)
    _check_amount(density, threshold, scope)
    if group is not None and structure != "element":
        raise MaskError(f"structure={structure!r} needs whole tensors: over a group only element masks can be chosen")
    total = sum(t.numel() for t in tensors)
    if group is not None and scope == "global":
        whole = torch.tensor(total, dtype=torch.int64, device=tensors[0].device if tensors else "cpu")
        torch.distributed.all_reduce(whole, group=group)
        total = int(whole)
    if not total:
        raise MaskError("there are no scores to choose from")

    reached: float | None
    if threshold is not None:
        if structure == "element":
            keep, reached = _at_or_above(tensors, names, threshold), threshold
        else:
            keep, reached = _best_blocks(tensors, names, None, threshold, structure, tile)
    else:
        assert density is not None
        if scope == "tensor":
            keep, reached = [], None
            for t, name in zip(tensors, names):
                keep += _top([t], [name], round(t.numel() * density), structure, tile)[0]
        else:
            keep, reached = _top(tensors, names, round(total * density), structure, tile, group)
    if group is None and not any(bool(k.any()) for k in keep):
        wanted = f"density {density}" if density is not None else f"threshold {threshold}"
        raise MaskError(f"{wanted} keeps none of {total} weights")
    return keep, reached


def _top(
    tensors: Sequence[Tensor], names: Sequence[str], k: int, structure: str, tile: Sequence[int], group: Any = None
) -> tuple[list[Tensor], float | None]:
    if structure != "element":
        return _best_blocks(tensors, names, k, None, structure, tile)
    if k == 0:
        # Scores are judged even where none is kept.
        _at_or_above(tensors, names, 0.0)
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in tensors], None
    return radix.keep_top_k(tensors, k, group, names)
