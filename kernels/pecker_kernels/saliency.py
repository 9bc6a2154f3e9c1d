"""Saliency scores: gradients summed in place, one float32 number per weight (PECKER 2604.05634, Eq. 8-9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .errors import PeckerKernelsError, ScoreError

REDUCTIONS = ("sum", "abs", "square")


class SaliencyScores:
    """Accumulates one score per weight of every parameter that requires a gradient.

    named_params: (name, parameter) pairs, e.g. model.named_parameters(); their order is the order of ties in a mask.
    reduction: "sum" |Σ g| (SalUn), "abs" Σ |g| (SPARE), "square" Σ g² (Fisher); g is the gradient at one call of
    `accumulate`.

    The accumulators are float32, on the parameter's device.
    """

    def __init__(self, named_params: Iterable[tuple[str, Tensor]], reduction: str = "sum") -> None:
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

        last: a hint that no further call follows; it does not change the scores. Raises PeckerKernelsError for sparse
        gradients and after `contrast_`. Gradients that are not finite are found when the mask is built.
        """
        if self._contrasted:
            raise PeckerKernelsError("scores were already contrasted: accumulate first, then contrast")
        pairs = [(self._scores[name], p.grad) for name, p in self._params.items() if p.grad is not None]
        if any(g.is_sparse for _, g in pairs):
            raise PeckerKernelsError("sparse gradients cannot be scored")
        self.accumulations += 1
        if not pairs:
            return
        scores = [s for s, _ in pairs]
        grads = [g if g.dtype == torch.float32 else g.float() for _, g in pairs]
        if self.reduction == "sum":
            torch._foreach_add_(scores, grads)
        elif self.reduction == "abs":
            torch._foreach_add_(scores, torch._foreach_abs(grads))
        else:
            torch._foreach_addcmul_(scores, grads, grads)

    def named_scores(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 score ≥ 0 of the parameter's shape), in named_parameters order. Do not write into the
        tensors."""
        if not self.accumulations:
            raise ScoreError("no gradient was accumulated: call backward() and accumulate() first")
        for name, score in self._scores.items():
            yield name, score.abs() if self.reduction == "sum" else score

    @torch.no_grad()
    def contrast_(self, retain_scores: SaliencyScores, floor: float = 1e-3) -> SaliencyScores:
        """s ← s / (r + floor · mean(r)), in place, so that weights that matter for everything are not taken for the
        concept's.

        r is the root mean square of the retain gradient of each weight, sqrt(Σ g² / n) over the n accumulations of
        `retain_scores`, which must have been built with reduction="square" on the same parameters; mean(r) is taken
        over all weights of the model. s is the final score (|Σ g| for "sum"). Returns self.
        """
        if retain_scores.reduction != "square" or retain_scores._contrasted:
            raise PeckerKernelsError(
                'contrast_ takes the root mean square: build the other scores with reduction="square"'
            )
        if not (math.isfinite(floor) and floor > 0):
            raise PeckerKernelsError(f"floor must be a positive number, got {floor}")
        if self._contrasted:
            raise PeckerKernelsError("scores were already contrasted")
        ours, theirs = dict(self.named_scores()), dict(retain_scores.named_scores())
        if [(n, s.shape) for n, s in ours.items()] != [(n, s.shape) for n, s in theirs.items()]:
            raise PeckerKernelsError("contrast_ takes scores of the same parameters in the same order")
        rms = {name: (s / retain_scores.accumulations).sqrt_() for name, s in theirs.items()}
        mean = math.fsum(float(r.sum(dtype=torch.float64)) for r in rms.values()) / self.total
        if not math.isfinite(mean):
            bad = next(name for name, r in rms.items() if not bool(r.isfinite().all()))
            raise ScoreError(f"retain scores of {bad!r} hold NaN or inf: the gradients they come from are not finite")
        if mean == 0:
            raise ScoreError("every retain gradient is zero: there is nothing to contrast with")
        for name, score in ours.items():
            self._scores[name] = score.div_(rms[name].add_(floor * mean))
        self._contrasted = True
        return self
