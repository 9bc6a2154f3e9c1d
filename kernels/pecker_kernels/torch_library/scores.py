"""torch.library operations on scores, thresholds and clipping norms (torch.ops.pecker.*); see ops.py.

Gradients and scores are lists of tensors, one call for a whole model. impl as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..adam import step as adam_step
from ..errors import PeckerKernelsError
from ..mask.bits import sound_bits
from ..overlap import shared_pair
from ..scores import saliency, threshold
from ..scores.backend import serving

# Of one weight. accumulate_: the sum, and for "square" the product. contrast_: s / (√(o / n) + floor), and √(o / n) with
# its sum for the mean before it. clip_norm_factor: the square and the sum.
ACCUMULATE_FLOPS = {"sum": 1, "abs": 1, "square": 2}
CONTRAST_FLOPS = 7
KEEP_FLOPS = 1
CLIP_NORM_FLOPS = 2


def _check_scores(scores: Sequence[Tensor], others: Sequence[Tensor], what: str, reduction: str) -> None:
    if reduction not in saliency.REDUCTIONS:
        raise PeckerKernelsError(f"unknown reduction {reduction!r}: choose from {', '.join(saliency.REDUCTIONS)}")
    if len(others) != len(scores):
        raise PeckerKernelsError(f"{what} has {len(others)} tensors for {len(scores)} scores")
    for i, (score, other) in enumerate(zip(scores, others)):
        if score.dtype != torch.float32 or not score.is_contiguous():
            raise PeckerKernelsError(f"scores[{i}] must be contiguous float32, got {score.dtype}")
        if other.is_sparse or other.shape != score.shape or not other.is_floating_point():
            raise PeckerKernelsError(
                f"{what}[{i}] is {other.dtype} {list(other.shape)}: a dense floating tensor of shape "
                f"{list(score.shape)} is expected"
            )
    pair = shared_pair(enumerate(scores))
    if pair is not None:
        raise PeckerKernelsError(
            f"scores[{pair[0]}] and scores[{pair[1]}] share memory: each has to be a tensor of its own"
        )


@torch.library.custom_op("pecker::accumulate_", mutates_args=("scores",))
def accumulate_(scores: list[Tensor], grads: list[Tensor], reduction: str, impl: str = "auto") -> None:
    """score += g ("sum"), |g| ("abs") or g² ("square") in place; see SaliencyScores.

    scores: contiguous float32. grads: of the same shapes, any floating dtype and strides. The score of "sum" is the
    absolute value of what was accumulated. Raises PeckerKernelsError for lists that do not match.
    """
    _check_scores(scores, grads, "grads", reduction)
    serving(impl, *scores).accumulate_(scores, grads, reduction, False)


@torch.library.custom_op("pecker::contrast_", mutates_args=("scores",))
def contrast_(
    scores: list[Tensor],
    square_sums: list[Tensor],
    count: int,
    reduction: str,
    floor: float = 1e-3,
    impl: str = "auto",
) -> None:
    """s ← s / (r + floor · mean(r)) in place, r = sqrt(square_sum / count), the mean over all weights of the list; see
    SaliencyScores.contrast_.

    scores: what accumulate_ made with `reduction`; s is its absolute value for "sum". square_sums: what it made of other
    gradients with "square" in `count` calls; contiguous float32. Raises PeckerKernelsError for lists that do not match,
    ScoreError where square_sums are not finite or all zero.
    """
    _check_scores(scores, square_sums, "square_sums", reduction)
    for i, squares in enumerate(square_sums):
        if squares.dtype != torch.float32 or not squares.is_contiguous():
            raise PeckerKernelsError(f"square_sums[{i}] must be contiguous float32, got {squares.dtype}")
    if count < 1:
        raise PeckerKernelsError(f"count is the number of accumulated gradients, at least 1, got {count}")
    saliency.contrast_(serving(impl, *scores), scores, square_sums, count, floor, reduction == "sum")


@torch.library.custom_op("pecker::kth_largest", mutates_args=())
def kth_largest(tensors: list[Tensor], k: int, impl: str = "auto") -> Tensor:
    """See threshold.kth_largest; a 0-dim float32 tensor on the device of the first tensor. Waits for the device."""
    value = threshold.kth_largest(tensors, k, impl=impl)
    return torch.tensor(value, dtype=torch.float32, device=tensors[0].device)


@torch.library.custom_op("pecker::keep_top_k", mutates_args=())
def keep_top_k(tensors: list[Tensor], k: int, impl: str = "auto") -> list[Tensor]:
    """uint8 [ceil(n / 8)] of each tensor: exactly the k largest values over all tensors; see threshold.keep_top_k. Waits
    for the device."""
    return threshold.keep_bits(serving(impl, *tensors), tensors, k)[0]


@torch.library.custom_op("pecker::clip_norm_factor", mutates_args=())
def clip_norm_factor(
    grads: list[Tensor], bits: list[Tensor], max_norm: float, clip_value: float | None = None, impl: str = "auto"
) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), the factor by which clipping scales gradients: norm is L2 over the kept weights
    of all tensors, clamped to ±clip_value first where that is given. Nothing is written, other weights are not read.

    grads: floating tensors. bits: uint8 [ceil(n / 8)] each, or [] for all weights. Returns a 0-dim tensor on the device
    of the first gradient, float64 if one of them is, float32 else. masked_adam_ clips by the same factor.
    """
    if bits and len(bits) != len(grads):
        raise PeckerKernelsError(f"bits has {len(bits)} tensors for {len(grads)} grads")
    for i, g in enumerate(grads):
        if not g.is_floating_point():
            raise PeckerKernelsError(f"grads[{i}] is {g.dtype}: a norm is taken over floating tensors")
    bits = [sound_bits(b, g.numel(), f"bits[{i}]") for i, (b, g) in enumerate(zip(bits, grads))]
    result = _scalar_of(grads)
    if not grads:
        return result.fill_(1)
    norm = adam_step.square_sum(grads, bits, clip_value, impl).sqrt()
    return result.copy_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def _scalar_of(tensors: Sequence[Tensor]) -> Tensor:
    """0-dim, not filled: float64 if one of the tensors is."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.empty((), dtype=dtype, device=tensors[0].device if tensors else None)


@accumulate_.register_fake
def _(scores: list[Tensor], grads: list[Tensor], reduction: str, impl: str = "auto") -> None:
    return None


@contrast_.register_fake
def _(*_, **__) -> None:  # type: ignore[no-untyped-def]
    return None


@kth_largest.register_fake
def _(tensors: list[Tensor], k: int, impl: str = "auto") -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


@keep_top_k.register_fake
def _(tensors: list[Tensor], k: int, impl: str = "auto") -> list[Tensor]:
    return [t.new_empty((t.numel() + 7) // 8, dtype=torch.uint8) for t in tensors]


@clip_norm_factor.register_fake
def _(grads: list[Tensor], *_, **__) -> Tensor:  # type: ignore[no-untyped-def]
    return _scalar_of(grads)


def _no_backward(ctx: Any, *_: Any) -> None:
    raise AssertionError("its output is marked as not differentiable")


def _constant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


# A threshold and a factor are constants for whoever takes a derivative, also where gradients carry a graph.
for _operation in (kth_largest, clip_norm_factor):
    _operation.register_autograd(_no_backward, setup_context=_constant)


def _weights(shapes: Sequence[Sequence[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


@register_flop_formula(torch.ops.pecker.accumulate_)
def _accumulate_flops(scores_shape, grads_shape, reduction, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return ACCUMULATE_FLOPS[reduction] * _weights(scores_shape)


@register_flop_formula(torch.ops.pecker.contrast_)
def _contrast_flops(scores_shape, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return CONTRAST_FLOPS * _weights(scores_shape)


@register_flop_formula(torch.ops.pecker.kth_largest)
def _kth_largest_flops(*_, **__) -> int:  # type: ignore[no-untyped-def]
    return 0


@register_flop_formula(torch.ops.pecker.keep_top_k)
def _keep_top_k_flops(tensors_shape, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return KEEP_FLOPS * _weights(tensors_shape)


# For all weights: shapes do not tell how many a mask keeps.
@register_flop_formula(torch.ops.pecker.clip_norm_factor)
def _clip_norm_flops(grads_shape, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return CLIP_NORM_FLOPS * _weights(grads_shape)
