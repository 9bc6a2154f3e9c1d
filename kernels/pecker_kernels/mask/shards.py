"""Scores and masks of a model whose weights are spread over ranks: every rank scores its own, all agree on one mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from ..scores import selection
from ..scores import threshold as radix
from ..scores.backend import ALL_TIES, Backend, serving
from ..scores.saliency import SaliencyScores, check_floor, retain_mean
from . import bits as bitmask
from .saliency import SaliencyMask

PARTITION = "partition"  # what a rank's own vector is called where something goes by name


@dataclass(frozen=True)
class Piece:
    """Elements start..stop (row-major) of tensor `name` lie at `offset` of this rank's vector."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Shards:
    """Which weights of a model this rank's flat vector holds. ZeRO's optimizer partitions are such vectors.

    shapes: {name: shape} of all tensors, in named_parameters order, the same on every rank. pieces: what lies here; over
    all ranks every element of every tensor lies in one place. length: elements of the vector; what no piece covers is
    padding, which is never scored, kept or counted. group: the torch.distributed group of the ranks (None: the default one,
    and nobody else where there is none). Raises MaskError for pieces that do not fit.

    Whatever takes all ranks says so; every rank must call it, in the same order.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], pieces: Sequence[Piece], length: int, group: Any = None
    ) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.pieces = sorted(pieces, key=lambda piece: piece.offset)
        self.length = length
        self.group = group
        sizes = [shape.numel() for shape in self.shapes.values()]
        self.total = sum(sizes)
        self._first = dict(zip(self.shapes, accumulate([0, *sizes])))
        end = 0
        for piece in self.pieces:
            inside = piece.name in self.shapes and 0 <= piece.start <= piece.stop <= self.shapes[piece.name].numel()
            if not inside or piece.offset < end or piece.offset + piece.numel > length:
                raise MaskError(f"{piece} does not fit a vector of {length} elements behind its neighbours")
            end = piece.offset + piece.numel
        self._of: dict[str, list[Piece]] = {name: [] for name in self.shapes}
        for piece in self.pieces:
            self._of[piece.name].append(piece)

    @property
    def alone(self) -> bool:
        """No other rank holds anything."""
        return not torch.distributed.is_initialized() or torch.distributed.get_world_size(self.group) == 1

    def everyone(self) -> Any:
        """The group, as collectives want it named; None where this process is alone."""
        if self.alone:
            return None
        return self.group if self.group is not None else torch.distributed.group.WORLD

    def pieces_of(self, name: str) -> list[Piece]:
        """What of one tensor lies here, in the order of the vector."""
        return self._of[name]

    def view(self, vector: Tensor, piece: Piece) -> Tensor:
        """The part of a vector that a piece covers, 1-D, itself."""
        return vector.narrow(0, piece.offset, piece.numel)

    def owned(self, name: str, tensor: Tensor) -> list[tuple[Piece, Tensor]]:
        """(piece, its elements of the whole tensor, 1-D) for what of it lies here."""
        flat = tensor.reshape(-1)
        return [(piece, flat[piece.start : piece.stop]) for piece in self._of[name]]

    def offsets(self) -> list[int]:
        """Flat index in the model of each piece's first element."""
        return [self._first[piece.name] + piece.start for piece in self.pieces]

    def gather(self, vector: Tensor, name: str) -> Tensor:
        """The whole tensor, to the bit, on every rank. Takes all ranks.

        vector: [length] of any dtype of 1, 2, 4 or 8 bytes.
        """
        whole = torch.zeros(self.shapes[name].numel(), dtype=vector.dtype, device=vector.device)
        for piece in self._of[name]:
            whole[piece.start : piece.stop] = self.view(vector, piece)
        group = self.everyone()
        if group is not None:
            # as integers: a sum with +0.0 would turn -0.0 around
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[vector.element_size()]
            bits = whole.view(kind)
            if kind == torch.int16:  # not every backend adds these
                bits = bits.to(torch.int32)
            torch.distributed.all_reduce(bits, group=group)
            whole = bits.to(kind).view(vector.dtype)
        return whole.view(self.shapes[name])

    def scatter_(self, vector: Tensor, name: str, tensor: Tensor) -> None:
        """Write what of a whole tensor lies here into the vector."""
        for piece, values in self.owned(name, tensor):
            self.view(vector, piece).copy_(values)

    def cut(self, mask: SaliencyMask) -> SaliencyMask:
        """The mask of this rank's vector alone, one tensor called "partition"; padding is not kept.

        Raises MaskError where the mask is of another model.
        """
        mask.check({name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()})
        keep = torch.zeros(self.length, dtype=torch.bool)
        for name, pieces in self._of.items():
            if pieces:
                whole = mask.bool(name).reshape(-1).cpu()
                for piece in pieces:
                    keep[piece.offset : piece.offset + piece.numel] = whole[piece.start : piece.stop]
        return SaliencyMask({PARTITION: bitmask.pack_bits(keep)}, {PARTITION: [self.length]}, threshold=mask.threshold)

    # -- scores -------------------------------------------------------------------------------------------------------

    def scores(self, device: torch.device | str, reduction: str = "sum", impl: str = "auto") -> SaliencyScores:
        """Accumulators for this rank's vector: `add([gradient])` takes its gradient, float32 [length]."""
        vector = torch.empty(1, device=device).expand(self.length).requires_grad_(True)
        return SaliencyScores([(PARTITION, vector)], reduction=reduction, impl=impl)

    @torch.no_grad()
    def contrast_(self, scores: SaliencyScores, retain_scores: SaliencyScores, floor: float = 1e-3) -> SaliencyScores:
        """SaliencyScores.contrast_ over all ranks, with the same numbers to the bit. Takes all ranks."""
        check_floor(floor)
        ((_, squares),) = retain_scores._accumulated()
        count, ops = retain_scores.accumulations, serving("auto", squares)
        sums = [float(ops.rms_sums([self.gather(squares, name)], count)) for name in self.shapes]
        return scores.contrast_(retain_scores, floor, mean=retain_mean(sums, self.total, list(self.shapes)))

    @torch.no_grad()
    def mask(
        self,
        scores: SaliencyScores,
        density: float | None = None,
        threshold: float | None = None,
        scope: str = "global",
        structure: str = "element",
        tile: tuple[int, int] = (128, 128),
        impl: str = "auto",
    ) -> SaliencyMask:
        """The mask SaliencyMask.from_scores would make of the gathered scores, bit for bit, whole on every rank.

        Elements are chosen where they lie: integer histograms are added up over the ranks, equal scores decided by their
        flat index in the model, wherever they lie. For blocks one tensor's scores are gathered at a time. Arguments and
        errors as there. Takes all ranks.
        """
        ((_, vector),) = scores._accumulated()
        chosen = _Chosen(self, vector, scores.reduction == "sum", serving(impl, vector))
        selection.check_choice(structure, scope, tile)
        selection.check_amount(density, threshold, scope)
        if structure != "element":
            whole = _Gathered(self, vector, chosen.magnitude, chosen.ops)
            choice = selection.choose(
                whole, density=density, threshold=threshold, scope=scope, structure=structure, tile=tile
            )
            bits, reached = dict(zip(self.shapes, choice.bits)), choice.threshold
        else:
            keep, reached = chosen.elements(density, threshold, scope)
            bits = {name: bitmask.pack_bits(self.gather(keep, name)) for name in self.shapes}
        mask = SaliencyMask(bits, self.shapes, structure=structure, scope=scope, tile=tile, threshold=reached)
        if not mask.count:
            wanted = f"density {density}" if density is not None else f"threshold {threshold}"
            raise MaskError(f"{wanted} keeps none of {self.total} weights")
        return mask


@dataclass
class _Chosen:
    """Elements chosen where they lie."""

    shards: Shards
    vector: Tensor
    magnitude: bool
    ops: Backend

    def elements(self, density: float | None, threshold: float | None, scope: str) -> tuple[Tensor, float | None]:
        """(uint8 [length], one where kept; threshold where there is a single one)."""
        keep = torch.zeros(self.shards.length, dtype=torch.uint8, device=self.vector.device)
        pieces = self.shards.pieces
        if threshold is not None:
            self._at_or_above(keep, threshold)
            return keep, threshold
        assert density is not None
        if scope == "global":
            return keep, self._best(keep, pieces, round(self.shards.total * density))
        for name, shape in self.shards.shapes.items():
            self._best(keep, self.shards.pieces_of(name), round(shape.numel() * density))
        return keep, None

    def _best(self, keep: Tensor, pieces: Sequence[Piece], k: int) -> float | None:
        if k == 0:
            return None
        first = dict(zip(self.shards.pieces, self.shards.offsets()))
        bits, _, reached = radix.keep_bits(
            self.ops, [self.shards.view(self.vector, piece) for piece in pieces], k, self.shards.everyone(),
            [piece.name for piece in pieces], [first[piece] for piece in pieces], self.magnitude,
        )  # fmt: skip
        self._write(keep, pieces, bits)
        return reached

    def _at_or_above(self, keep: Tensor, cut: float) -> None:
        pieces = self.shards.pieces
        views = [self.shards.view(self.vector, piece) for piece in pieces]
        bits, _, faults = self.ops.keep_bits(views, self.magnitude, cut, [ALL_TIES] * len(views))
        radix.refuse_faults(faults, [piece.name for piece in pieces], negative_too=False, group=self.shards.everyone())
        self._write(keep, pieces, bits)

    def _write(self, keep: Tensor, pieces: Sequence[Piece], bits: Sequence[Tensor]) -> None:
        for piece, packed in zip(pieces, bits):
            self.shards.view(keep, piece).copy_(bitmask.unpack_bits(packed, piece.numel))


class _Gathered(selection.Scored):
    """Scores that are fetched one tensor at a time, when their blocks are summed."""

    def __init__(self, shards: Shards, vector: Tensor, magnitude: bool, ops: Backend) -> None:
        super().__init__([], list(shards.shapes), ops, magnitude)
        object.__setattr__(self, "_shards", shards)
        object.__setattr__(self, "_vector", vector)

    @property
    def total(self) -> int:
        return self._shards.total  # type: ignore[attr-defined]

    @property
    def shapes(self) -> Sequence[torch.Size]:
        return list(self._shards.shapes.values())  # type: ignore[attr-defined]

    def whole(self, i: int) -> Tensor:
        return self._shards.gather(self._vector, self.names[i])  # type: ignore[attr-defined]

    def each(self) -> Iterator[selection.Scored]:
        for i, name in enumerate(self.names):
            yield selection.Scored([self.whole(i)], [name], self.ops, self.magnitude)
