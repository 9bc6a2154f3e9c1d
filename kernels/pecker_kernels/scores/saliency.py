"""Saliency scores: gradients summed in place, one float32 number per weight (PECKER 2604.05634, Eq. 8-9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import PeckerKernelsError, ScoreError
from .backend import Backend, Census, serving

REDUCTIONS = ("sum", "abs", "square")


def contrast_(
    ops: Backend,
    scores: Sequence[Tensor],
    square_sums: Sequence[Tensor],
    count: int,
    floor: float,
    magnitude: bool,
    names: Sequence[str] | None = None,
) -> Census | None:
    """SaliencyScores.contrast_ on plain tensors, by a given implementation: contiguous float32 of equal shapes."""
    check_floor(floor)
    sums = ops.rms_sums(square_sums, count).tolist()
    mean = retain_mean(sums, sum(s.numel() for s in scores), names)
    return ops.contrast_(scores, square_sums, count, floor * mean, magnitude)


def check_floor(floor: float) -> None:
    """Raise PeckerKernelsError unless the floor of a contrast is a positive number."""
    if not (math.isfinite(floor) and floor > 0):
        raise PeckerKernelsError(f"floor must be a positive number, got {floor}")


def retain_mean(sums: Sequence[float], total: int, names: Sequence[str] | None = None) -> float:
    """mean(r) of a contrast over all `total` weights, of the sums of r in each tensor. Raises ScoreError."""
    mean = math.fsum(sums) / max(1, total)
    if not math.isfinite(mean):
        bad = next(i for i, value in enumerate(sums) if not math.isfinite(value))
        label = f"{names[bad]!r}" if names is not None else f"tensor {bad}"
        raise ScoreError(f"retain scores of {label} hold NaN or inf: the gradients they come from are not finite")
    if mean == 0:
        raise ScoreError("every retain gradient is zero: there is nothing to contrast with")
    return mean


class SaliencyScores:
    """Accumulates one score per weight of every parameter that requires a gradient.

    named_params: (name, parameter) pairs, e.g. model.named_parameters(); their order is the order of ties in a mask.
    reduction: "sum" |Σ g| (SalUn), "abs" Σ |g| (SPARE), "square" Σ g² (Fisher); g is the gradient at one call of
    `accumulate`.

    impl: "auto" | "triton" | "cpu" | "reference", who does the arithmetic.

    The accumulators are float32, on the parameter's device. Implementations agree to the bit on "sum" and "abs"; on
    "square" the C++ kernels round g·g before they add it, as reference.accumulate_ does, while torch's addcmul may fuse
    the two: each is at least as accurate as the other to 1 ulp of the sum.
    """

    def __init__(self, named_params: Iterable[tuple[str, Tensor]], reduction: str = "sum", impl: str = "auto") -> None:
        if reduction not in REDUCTIONS:
            raise PeckerKernelsError(f"unknown reduction {reduction!r}: choose from {', '.join(REDUCTIONS)}")
        self.reduction = reduction
        self.accumulations = 0
        self._params = {name: p for name, p in named_params if p.requires_grad}
        if not self._params:
            raise PeckerKernelsError("no parameter requires a gradient: there is nothing to score")
        self._scores = {
            name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in self._params.items()
        }
        self._contrasted = False
        self._ops = serving(impl, *self._scores.values())
        self._counted: tuple[Census, list[int]] | None = None
        self._lent = False  # somebody else holds the accumulators
        self._sums: Tensor | None = None  # of their bits when that began, or when they were counted after it

    @property
    def names(self) -> list[str]:
        return list(self._scores)

    @property
    def total(self) -> int:
        """Number of scored weights."""
        return sum(s.numel() for s in self._scores.values())

    @torch.no_grad()
    def accumulate(self, last: bool = False) -> None:
        """Add the gradients that stand in `.grad` now; a missing gradient counts as zero, `.grad` itself is not
        changed.

        last: a hint that no further call follows: the first histogram of the selection is then counted while the scores
        are written, so a global element mask saves a pass; it does not change the scores. Raises PeckerKernelsError for sparse
        gradients and after `contrast_`. Gradients that are not finite are found when the mask is built.
        """
        self.add([p.grad for p in self._params.values()], last)

    @torch.no_grad()
    def add(self, grads: Sequence[Tensor | None], last: bool = False) -> None:
        """`accumulate` of gradients that lie elsewhere, one for each of `names`, None for zero."""
        if self._contrasted:
            raise PeckerKernelsError("scores were already contrasted: accumulate first, then contrast")
        if [None if g is None else g.shape for g in grads] != [
            None if g is None else s.shape for g, s in zip(grads, self._scores.values(), strict=False)
        ] or len(grads) != len(self._scores):
            raise PeckerKernelsError("gradients must be of the scores' shapes, one for each")
        for name, g in zip(self._scores, grads):
            if g is not None and (g.is_sparse or g.is_meta or not g.is_floating_point()):
                kind = "sparse" if g.is_sparse else f"{g.dtype} on {g.device}"
                raise PeckerKernelsError(f"the gradient of {name!r} is {kind}: dense floating numbers can be scored")
        self.accumulations += 1
        self._remember(self._ops.accumulate_(list(self._scores.values()), grads, self.reduction, last))

    @torch.no_grad()
    def add_part(self, name: str, start: int, values: Tensor) -> None:
        """Add the gradient of the elements start.. (row-major) of one tensor, 1-D: of a gradient that comes piece by piece.
        `counted` says when that was a whole one."""
        if self._contrasted:
            raise PeckerKernelsError("scores were already contrasted: accumulate first, then contrast")
        flat = self._scores[name].view(-1)
        if not values.is_floating_point() or values.is_meta:
            raise PeckerKernelsError(
                f"the gradient of {name!r} is {values.dtype} on {values.device}, not floating numbers"
            )
        if values.dim() != 1 or not 0 <= start <= start + values.numel() <= flat.numel():
            raise PeckerKernelsError(f"elements {start}..{start + values.numel()} are not in {name!r}")
        self._remember(None)
        self._ops.accumulate_([flat[start : start + values.numel()]], [values], self.reduction, False)

    def counted(self, gradients: int = 1) -> None:
        """So many gradients have been added in parts, or by others whose sums were added to these."""
        self.accumulations += gradients

    def _remember(self, census: Census | None) -> None:
        self._counted = None if census is None else (census, self._versions())
        self._sums = self._bit_sums() if self._lent and census is not None else None

    def _versions(self) -> list[int]:
        return [s._version for s in self._scores.values()]

    def _bit_sums(self) -> Tensor:
        """int64 [number of tensors]: Σ of each tensor's bit patterns."""
        sums = [s.view(torch.int32).sum(dtype=torch.int64) for s in self._scores.values()]
        return torch.stack([s.to(sums[0].device) for s in sums])

    def census(self) -> Census | None:
        """The first pass of a selection over `accumulators` as they are now, where one was taken along with them."""
        if self._counted is None or self._counted[1] != self._versions():
            return None
        if self._sums is not None and not torch.equal(self._sums, self._bit_sums()):
            return None
        return self._counted[0]

    def accumulators(self) -> list[tuple[str, Tensor]]:
        """(name, float32 accumulator itself) in named_parameters order; for "sum" the score is its absolute value.

        They may be written into, e.g. summed over ranks: what was counted of them before is then counted anew.
        """
        named = self._accumulated()
        self._lend()
        return named

    def _accumulated(self) -> list[tuple[str, Tensor]]:
        """`accumulators` for readers."""
        if not self.accumulations:
            raise ScoreError("no gradient was accumulated: call backward() and accumulate() first")
        return list(self._scores.items())

    def _lend(self) -> None:
        # Collectives, `.data`, numpy and kernels of others write past the version counter; the bits tell.
        self._lent = True
        if self._counted is not None and self._sums is None:
            self._sums = self._bit_sums()

    def named_scores(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 score ≥ 0 of the parameter's shape), in named_parameters order. Do not write into the
        tensors."""
        named = self._accumulated()
        if self.reduction != "sum":
            self._lend()
        for name, score in named:
            yield name, score.abs() if self.reduction == "sum" else score

    @torch.no_grad()
    def contrast_(
        self, retain_scores: SaliencyScores, floor: float = 1e-3, mean: float | None = None
    ) -> SaliencyScores:
        """s ← s / (r + floor · mean(r)), in place, so that weights that matter for everything are not taken for the
        concept's.

        r is the root mean square of the retain gradient of each weight, sqrt(Σ g² / n) over the n accumulations of
        `retain_scores`, which must have been built with reduction="square" on the same parameters; mean(r) is taken
        over all weights of the model; `mean` gives it where these scores are a part of them alone. s is the final score
        (|Σ g| for "sum"). Returns self.
        """
        if retain_scores.reduction != "square" or retain_scores._contrasted:
            raise PeckerKernelsError(
                'contrast_ takes the root mean square: build the other scores with reduction="square"'
            )
        if self._contrasted:
            raise PeckerKernelsError("scores were already contrasted")
        ours, theirs = self._accumulated(), retain_scores._accumulated()
        if [(n, s.shape) for n, s in ours] != [(n, s.shape) for n, s in theirs]:
            raise PeckerKernelsError("contrast_ takes scores of the same parameters in the same order")
        scores, squares, count = [s for _, s in ours], [s for _, s in theirs], retain_scores.accumulations
        magnitude = self.reduction == "sum"
        if mean is None:
            self._remember(contrast_(self._ops, scores, squares, count, floor, magnitude, self.names))
        else:
            check_floor(floor)
            self._remember(self._ops.contrast_(scores, squares, count, floor * mean, magnitude))
        self._contrasted = True
        return self
