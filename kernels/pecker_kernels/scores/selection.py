"""Which weights a mask keeps: element, row, tile and tensor structures, globally or per tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError, ScoreError
from . import threshold as radix
from .backend import ALL_TIES, Backend, Census, grid

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
    rows, columns = grid(shape)
    height, width = {"row": (1, columns), "tile": (tile[0], tile[1]), "tensor": (rows, columns)}[structure]
    return rows, columns, max(height, 1), max(width, 1)


def _sides(length: int, side: int) -> Tensor:
    """int64 extents of the blocks along one dimension; only the last can be shorter."""
    sides = torch.full((-(-length // side),), side, dtype=torch.int64)
    sides[-1:] -= -length % side
    return sides


def _block_sizes(rows: int, columns: int, height: int, width: int) -> Tensor:
    """int64 number of weights in each block, flat."""
    return (_sides(rows, height).view(-1, 1) * _sides(columns, width)).view(-1)


def random_scores(shape: torch.Size, structure: str, tile: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent uniform scores of a tensor's shape, one draw per block: a mean of many draws would favour small
    blocks."""
    if structure == "element" or not shape.numel():
        return torch.rand(shape, generator=generator)
    rows, columns, height, width = _grid(shape, structure, tile)
    draws = torch.rand(-(-rows // height), -(-columns // width), generator=generator)
    draws = draws.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return draws.reshape(shape)


@dataclass(frozen=True)
class Choice:
    """bits: uint8 [ceil(n / 8)] per tensor. counts: ones in each. threshold: that of SaliencyMask."""

    bits: list[Tensor]
    counts: list[int]
    threshold: float | None


@dataclass(frozen=True)
class Scored:
    """What is chosen from. magnitude: the score of a value is its absolute value. census: of these tensors, where the
    first pass was taken before."""

    tensors: Sequence[Tensor]
    names: Sequence[str]
    ops: Backend
    magnitude: bool = False
    census: Census | None = None

    @property
    def total(self) -> int:
        return sum(t.numel() for t in self.tensors)

    @property
    def shapes(self) -> Sequence[torch.Size]:
        return [t.shape for t in self.tensors]

    def whole(self, i: int) -> Tensor:
        """Scores of tensor i, all of them: what block sums are taken of."""
        return self.tensors[i]

    def each(self) -> Iterator[Scored]:
        """One tensor at a time."""
        for t, name in zip(self.tensors, self.names):
            yield Scored([t], [name], self.ops, self.magnitude)


def _nothing(tensors: Sequence[Tensor]) -> Choice:
    bits = [torch.zeros((t.numel() + 7) // 8, dtype=torch.uint8, device=t.device) for t in tensors]
    return Choice(bits, [0] * len(bits), None)


def _no_blocks(shapes: Sequence[torch.Size]) -> Choice:
    return Choice(
        [torch.zeros((shape.numel() + 7) // 8, dtype=torch.uint8) for shape in shapes], [0] * len(shapes), None
    )


def _read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of any devices on the host, by one wait for each device."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        here = [i for i, t in enumerate(tensors) if t.device == device]
        whole = torch.cat([tensors[i] for i in here]).cpu()
        found |= dict(zip(here, whole.split([tensors[i].numel() for i in here])))
    return [found[i] for i in range(len(tensors))]


def _best_blocks(s: Scored, k: int | None, cut: float | None, structure: str, tile: Sequence[int]) -> Choice:
    """Blocks by mean score: the best until k weights are covered, or all at or above `cut`."""
    out = _no_blocks(s.shapes)
    live = [(i, shape, _grid(shape, structure, tile)) for i, shape in enumerate(s.shapes) if shape.numel()]
    if not live:
        return out
    sizes = [_block_sizes(*at) for _, _, at in live]
    sums, homes = [], []
    for i, _, (_, _, height, width) in live:
        scores = s.whole(i)
        sums.append(s.ops.block_sums(scores, height, width, s.magnitude))
        homes.append(scores.device)
    means = [found / size for found, size in zip(_read(sums), sizes)]
    for (i, _, _), found in zip(live, means):
        if not bool(found.isfinite().all()):
            raise ScoreError(f"scores of {s.names[i]!r} hold NaN or inf: the gradients they come from are not finite")
    mean = torch.cat(means)
    reached: float | None
    if cut is not None:
        kept, reached = mean >= cut, cut
    else:
        assert k is not None
        # A stable sort leaves equal means in the order of the blocks.
        order = mean.sort(descending=True, stable=True).indices
        needed = int((torch.cat(sizes)[order].cumsum(0) < k).sum()) + 1 if k else 0
        kept = torch.zeros(len(mean), dtype=torch.bool)
        kept[order[:needed]] = True
        reached = float(mean[order[needed - 1]]) if needed else None
    parts = kept.split([len(m) for m in means])
    for (i, shape, (_, _, height, width)), size, part, home in zip(live, sizes, parts, homes):
        out.bits[i] = s.ops.block_bits(part.to(home), shape, height, width)
        out.counts[i] = int(size[part].sum())
    return Choice(out.bits, out.counts, reached)


def _at_or_above(s: Scored, cut: float) -> Choice:
    bits, counts, faults = s.ops.keep_bits(s.tensors, s.magnitude, cut, [ALL_TIES] * len(s.tensors))
    radix.refuse_faults(faults, s.names, negative_too=False)
    return Choice(bits, counts.tolist(), cut)


def check_amount(density: float | None, threshold: float | None, scope: str) -> None:
    """Raise MaskError unless exactly one of density and threshold is given, in its range."""
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
    s: Scored,
    *,
    density: float | None,
    threshold: float | None,
    scope: str,
    structure: str,
    tile: Sequence[int],
    group: Any = None,
) -> Choice:
    """Rules and errors as in SaliencyMask.from_scores."""
    check_choice(structure, scope, tile)
    check_amount(density, threshold, scope)
    if group is not None and structure != "element":
        raise MaskError(f"structure={structure!r} needs whole tensors: over a group only element masks can be chosen")
    total = s.total
    if group is not None and scope == "global":
        whole = torch.tensor(total, dtype=torch.int64, device=s.tensors[0].device if s.tensors else "cpu")
        torch.distributed.all_reduce(whole, group=group)
        total = int(whole)
    if not total:
        raise MaskError("there are no scores to choose from")

    if threshold is not None:
        if structure == "element":
            choice = _at_or_above(s, threshold)
        else:
            choice = _best_blocks(s, None, threshold, structure, tile)
    else:
        assert density is not None
        if scope == "tensor":
            parts = [_top(one, round(one.total * density), structure, tile) for one in s.each()]
            choice = Choice([b for p in parts for b in p.bits], [n for p in parts for n in p.counts], None)
        else:
            choice = _top(s, round(total * density), structure, tile, group)
    if group is None and not any(choice.counts):
        wanted = f"density {density}" if density is not None else f"threshold {threshold}"
        raise MaskError(f"{wanted} keeps none of {total} weights")
    return choice


def _top(s: Scored, k: int, structure: str, tile: Sequence[int], group: Any = None) -> Choice:
    if structure != "element":
        return _best_blocks(s, k, None, structure, tile)
    if k == 0:
        # Scores are judged even where none is kept.
        _at_or_above(s, 0.0)
        return _nothing(s.tensors)
    return Choice(*radix.keep_bits(s.ops, s.tensors, k, group, s.names, magnitude=s.magnitude, census=s.census))
