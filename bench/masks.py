"""Masks to time with: random ones, and element masks that cluster as real ones do."""

from __future__ import annotations

import math
from typing import Any

import pecker_kernels as pk
import torch
from pecker_kernels.mask import bits as bitmask
from shapes import Shapes
from torch import Tensor

# Spread of the scale of scores between rows and between tensors (standard deviations of its logarithm). At density .1
# a few per cent of the tensors and more than half of the rows are dead then, and a tenth of the rows holds most of
# what is kept: docs/performance.md. Each result says what its own mask has.
ROW_SPREAD, TENSOR_SPREAD = 0.2, 0.4


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    return rows, math.prod(shape) // max(rows, 1)


def clustered_scores(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Half-normal scores whose scale differs from row to row and from tensor to tensor."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, shape in shapes:
        rows, columns = _rows(shape)
        scale = ROW_SPREAD * torch.randn(rows, 1, generator=generator)
        scale += TENSOR_SPREAD * torch.randn((), generator=generator)
        scores[name] = (torch.randn(rows, columns, generator=generator).abs_() * scale.exp()).view(shape)
    return scores


def _quantile(scores: dict[str, Tensor], density: float) -> float:
    """The score above which about `density` of the weights lie, from a sample of at most a million."""
    stride = max(1, sum(s.numel() for s in scores.values()) >> 20)
    sample = torch.cat([s.reshape(-1)[::stride] for s in scores.values()]).sort(descending=True).values
    return float(sample[min(int(density * sample.numel()), sample.numel() - 1)])


def make_mask(
    shapes: Shapes, structure: str, density: float, clustered: bool = False, device: str = "cpu", seed: int = 0
) -> pk.SaliencyMask:
    """A mask of about this density; element masks are drawn independently or, `clustered`, from `clustered_scores`."""
    if density == 1:
        mask = pk.SaliencyMask.full({name: torch.empty(1).expand(shape) for name, shape in shapes})
    elif structure != "element":
        named = {name: torch.empty(1).expand(shape) for name, shape in shapes}
        mask = pk.SaliencyMask.random(named, density, structure, seed=seed)
    else:
        if clustered:
            scores = clustered_scores(shapes, seed)
            cut = _quantile(scores, density)
        else:
            generator = torch.Generator().manual_seed(seed)
            scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes}
            cut = 1 - density
        bits = {name: bitmask.pack_bits(score >= cut) for name, score in scores.items()}
        mask = pk.SaliencyMask(bits, dict(shapes))
    return mask.to(device)


def describe(mask: pk.SaliencyMask) -> dict[str, Any]:
    """Density, and how the kept weights cluster."""
    live = torch.cat([mask.bool(name).reshape(_rows(tuple(mask.shapes[name]))).sum(1) for name in mask.names])
    best = live.sort(descending=True).values[: max(1, live.numel() // 10)].sum()
    return {
        "kept": mask.count,
        "density_of_mask": mask.density,
        "dead_tensors": sum(not mask.count_of(name) for name in mask.names) / len(mask.names),
        "dead_rows": float((live == 0).double().mean()),
        "kept_in_best_tenth_of_rows": float(best / live.sum()),
    }
