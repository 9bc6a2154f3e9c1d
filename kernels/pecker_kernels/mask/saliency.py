"""SaliencyMask: one bit per weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from ..scores import selection
from ..scores.backend import serving
from ..scores.saliency import SaliencyScores
from . import bits as bitmask
from . import file as maskfile

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def _pairs(tensors: NamedTensors) -> list[tuple[str, Tensor]]:
    return list(tensors.items() if isinstance(tensors, Mapping) else tensors)


def _trainable(named_params: NamedTensors) -> list[tuple[str, Tensor]]:
    """Parameters that are frozen are never scored, so they are in no mask; plain tensors are all taken."""
    pairs = [(name, p) for name, p in _pairs(named_params) if p.requires_grad or not isinstance(p, torch.nn.Parameter)]
    if not pairs:
        raise MaskError("no parameter requires a gradient: there is nothing to mask")
    return pairs


class SaliencyMask:
    """Which weights of a model are salient, 1 bit each; built by `from_scores`, `random`, `full` or `load`.

    bits: {name: uint8 [ceil(n / 8)]}, least significant bit first, padding zero; in named_parameters order.
    shapes: {name: torch.Size}. structure: "element" | "row" | "tile" | "tensor". scope: "global" | "tensor".
    threshold: the score of the last weight (or block) kept, None where there is no single one. provenance: free
    strings.

    The bits given are copied. Nothing about them is remembered: counts and digest are those of the bits as they are now,
    and whoever steps or plans by a mask takes a copy first.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        bits: Mapping[str, Tensor],
        shapes: Mapping[str, Iterable[int]],
        *,
        structure: str = "element",
        scope: str = "global",
        tile: tuple[int, int] = (128, 128),
        threshold: float | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        selection.check_choice(structure, scope, tile)
        self.shapes = {name: torch.Size(shapes[name]) for name in bits}
        self.bits: dict[str, Tensor] = {}
        for name, packed in bits.items():
            self.bits[name] = (
                bitmask.sound_bits(packed, self.shapes[name].numel(), f"mask of {name!r}").detach().clone()
            )
        self.structure, self.scope, self.tile = structure, scope, (int(tile[0]), int(tile[1]))
        self.threshold = threshold
        self.provenance = dict(provenance or {})

    @classmethod
    def from_scores(
        cls,
        scores: SaliencyScores | NamedTensors,
        density: float | None = None,
        threshold: float | None = None,
        scope: str = "global",
        structure: str = "element",
        tile: tuple[int, int] = (128, 128),
        group: Any = None,
        provenance: Mapping[str, str] | None = None,
        impl: str = "auto",
    ) -> SaliencyMask:
        """Keep the most salient weights.

        scores: SaliencyScores, or {name: non-negative float tensor}. Exactly one of density, the share of weights in
        (0, 1], and threshold, keep where score ≥ γ (PECKER Eq. 10). scope "tensor" applies the density to each tensor
        by itself. An element mask keeps exactly round(N · density) weights, equal scores decided by the lowest flat
        index; block structures keep the best blocks by mean score until that many weights are covered, the last block
        whole. group: torch.distributed group whose ranks hold the scores of different tensors, consecutive in rank
        order (element masks); every rank gets the mask of its own tensors. impl: "auto" | "triton" | "cpu" | "reference".

        Raises ScoreError for scores that are not finite (naming the tensor), MaskError for arguments out of range or an
        empty result.
        """
        pairs = scores._accumulated() if isinstance(scores, SaliencyScores) else _pairs(scores)
        names, tensors = [name for name, _ in pairs], [s for _, s in pairs]
        ops = serving(impl, *tensors)
        if isinstance(scores, SaliencyScores):
            # Signed sums are ranked as they stand, without a copy of |s|.
            scored = selection.Scored(tensors, names, ops, scores.reduction == "sum", scores.census())
        else:
            scored = selection.Scored(tensors, names, ops)
        choice = selection.choose(
            scored,
            density=density,
            threshold=threshold,
            scope=scope,
            structure=structure,
            tile=tile,
            group=group,
        )
        return cls(
            dict(zip(names, choice.bits)),
            {name: s.shape for name, s in pairs},
            structure=structure,
            scope=scope,
            tile=tile,
            threshold=choice.threshold,
            provenance=provenance,
        )

    @classmethod
    def random(
        cls,
        named_params: NamedTensors,
        density: float,
        structure: str = "element",
        scope: str = "global",
        tile: tuple[int, int] = (128, 128),
        seed: int = 0,
    ) -> SaliencyMask:
        """The baseline: the same selection rule over independent uniform scores, one per element or one per block.

        Drawn by a CPU generator, so the mask depends on the seed and the shapes alone; bits lie on the parameters'
        devices.
        """
        pairs = _trainable(named_params)
        generator = torch.Generator().manual_seed(seed)
        scores = {name: selection.random_scores(p.shape, structure, tile, generator) for name, p in pairs}
        mask = cls.from_scores(
            scores,
            density=density,
            structure=structure,
            scope=scope,
            tile=tile,
            provenance={"source": "random", "seed": str(seed)},
        )
        mask.threshold = None
        for name, p in pairs:
            mask.bits[name] = mask.bits[name].to(p.device)
        return mask

    @classmethod
    def full(cls, named_params: NamedTensors) -> SaliencyMask:
        """Every weight kept."""
        pairs = _trainable(named_params)
        return cls(
            {name: bitmask.full_bits(p.numel(), p.device) for name, p in pairs}, {name: p.shape for name, p in pairs}
        )

    @property
    def names(self) -> list[str]:
        return list(self.bits)

    @property
    def count(self) -> int:
        """Number of weights kept; waits for the device."""
        return sum(map(bitmask.popcount, self.bits.values()))

    @property
    def total(self) -> int:
        """Number of weights the mask speaks of."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """count / total."""
        return self.count / self.total if self.total else 0.0

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bits: equal masks have equal digests."""
        sha = hashlib.sha256()
        for name, packed in self.bits.items():
            sha.update(json.dumps([name, list(self.shapes[name])]).encode())
            sha.update(packed.cpu().numpy().data)
        return sha.hexdigest()

    def _known(self, name: str) -> str:
        if name not in self.bits:
            raise MaskError(f"the mask has no tensor {name!r}")
        return name

    def count_of(self, name: str) -> int:
        """Number of weights kept in one tensor; waits for the device."""
        return bitmask.popcount(self.bits[self._known(name)])

    def density_of(self, name: str) -> float:
        """Share of weights kept in one tensor (0 for an empty one)."""
        n = self.shapes[self._known(name)].numel()
        return self.count_of(name) / n if n else 0.0

    def bool(self, name: str) -> Tensor:
        """bool tensor of the parameter's shape, True where the weight is kept."""
        shape = self.shapes[self._known(name)]
        return bitmask.unpack_bits(self.bits[name], shape.numel()).view(shape)

    def indices(self, name: str) -> Tensor:
        """int64 [count_of(name)] flat positions of the weights kept, ascending."""
        return bitmask.kept_indices(self.bits[self._known(name)], self.shapes[name].numel())

    def apply_(self, tensors: NamedTensors, impl: str = "auto") -> None:
        """t ⊙ m in place for {name: tensor} or (name, tensor) pairs of any floating dtype; kept elements keep their
        bits."""
        for name, tensor in _pairs(tensors):
            if self.shapes[self._known(name)] != tensor.shape:
                raise MaskError(f"{name!r} has shape {list(tensor.shape)}, its mask {list(self.shapes[name])}")
            bitmask.apply_(tensor, self.bits[name], impl)

    def check(self, named_params: NamedTensors) -> None:
        """Raise MaskError naming the first parameter that the mask lacks or has in another shape, or that the model
        lacks."""
        seen = set()
        for name, p in _pairs(named_params):
            seen.add(name)
            if name not in self.bits:
                if isinstance(p, torch.nn.Parameter) and not p.requires_grad:
                    continue
                raise MaskError(f"parameter {name!r} is not in the mask: the mask was made for another model")
            if self.shapes[name] != p.shape:
                raise MaskError(
                    f"parameter {name!r} has shape {list(p.shape)}, its mask {list(self.shapes[name])}: "
                    "the mask was made for another model"
                )
        for name in self.bits:
            if name not in seen:
                raise MaskError(
                    f"the mask has a tensor {name!r} that is not in the model: it was made for another model"
                )

    def clone(self) -> SaliencyMask:
        """A mask with bits of its own: what is done to these does not change it."""
        return self._like(self.bits)

    def to(self, device: torch.device | str) -> SaliencyMask:
        """A mask whose bits lie on `device`."""
        return self._like({name: packed.to(device) for name, packed in self.bits.items()})

    def _made(self) -> dict[str, Any]:
        """How it was made, as the keyword arguments of a mask like it."""
        return {
            "structure": self.structure,
            "scope": self.scope,
            "tile": self.tile,
            "threshold": self.threshold,
            "provenance": self.provenance,
        }

    def _like(self, bits: Mapping[str, Tensor], **changes: Any) -> SaliencyMask:
        return SaliencyMask(bits, self.shapes, **(self._made() | changes))

    def _combine(self, other: SaliencyMask, operation: Any) -> SaliencyMask:
        other.check({name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()})
        blocks = (self.structure, self.tile)
        structure = self.structure if blocks == (other.structure, other.tile) else "element"
        bits = {name: operation(packed, other.bits[name].to(packed.device)) for name, packed in self.bits.items()}
        return self._like(bits, structure=structure, threshold=None, provenance=None)

    def union(self, other: SaliencyMask) -> SaliencyMask:
        """Weights kept by either mask; both must be of the same model."""
        return self._combine(other, bitmask.union)

    def intersection(self, other: SaliencyMask) -> SaliencyMask:
        """Weights kept by both masks; both must be of the same model."""
        return self._combine(other, bitmask.intersection)

    __or__, __and__ = union, intersection

    def __eq__(self, other: object) -> Any:
        """The same weights of the same tensors in the same order; how they were chosen does not count."""
        if not isinstance(other, SaliencyMask):
            return NotImplemented
        return self.digest == other.digest

    def __repr__(self) -> str:
        return (
            f"SaliencyMask({self.structure}, density={self.density:.4g}, count={self.count}, total={self.total}, "
            f"tensors={len(self.bits)})"
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of 1 bit per weight; an older file at `path` is replaced whole or not at all."""
        maskfile.save(Path(path), bits=self.bits, shapes=self.shapes, count=self.count, **self._made())

    @classmethod
    def load(cls, path: str | Path) -> SaliencyMask:
        """Read a file written by `save`; bits lie on the CPU. Raises MaskError naming the tensor or key that is
        wrong."""
        return cls(**maskfile.load(Path(path)))
