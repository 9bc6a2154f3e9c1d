"""Batches in pieces that pass the networks at once, and what is added up over them."""

import torch
from torch import Tensor

from pecker_fast.forgetting import Batch, Gradients


def split(batches: list[Batch], micro_batch: int) -> list[tuple[float, list[Batch]]]:
    """(share of the batch, the batches' parts) of what passes at once: `micro_batch` samples of each; 0 = all in one."""
    n = batches[0].z.shape[0]
    size = micro_batch or n
    return [
        (min(size, n - start) / n, [batch.part(slice(start, start + size)) for batch in batches])
        for start in range(0, n, size)
    ]


def add_gradients(sum_so_far: Gradients | None, grads: Gradients) -> Gradients:
    """Σ of gradients of pieces; None counts as zero."""
    if sum_so_far is None:
        return grads
    return [b if a is None else a if b is None else a + b for a, b in zip(sum_so_far, grads)]


def total(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def weighted_mean(per_sample: Tensor, weights: dict[str, float]) -> Tensor:
    """Σ_branch weight · mean over the branch's samples; per_sample [branches · n] in the order of `weights`."""
    means = per_sample.float().view(len(weights), -1).mean(1)
    return torch.stack([weight * mean for weight, mean in zip(weights.values(), means.unbind())]).sum()
