"""One model with and without dead weights: gradients of live weights against the dense ones."""

from __future__ import annotations

import pecker_kernels as pk
import torch
from torch import Tensor, nn


def random_mask(model, density=0.4, structure="row", tile=(4, 8), seed=3):
    return pk.SaliencyMask.random(model.named_parameters(), density, structure=structure, tile=tile, seed=seed)


def mask_of(model, kept):
    """A row mask from {name: bool tensor or bool}; all else is dead."""
    bits, shapes = {}, {}
    for name, p in model.named_parameters():
        keep = torch.as_tensor(kept.get(name, False)).expand(p.shape).contiguous()
        bits[name], shapes[name] = pk.reference.pack_bits(keep), p.shape
    return pk.SaliencyMask(bits, shapes, structure="row")


def loss_of(y: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    return (y.square() * weights.view(y.shape)).sum()


def dense_grads(model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    params = [p for p in model.parameters() if p.requires_grad]
    given = iter(torch.autograd.grad(loss_of(model(*inputs)), params, allow_unused=True))
    return [next(given) if p.requires_grad else None for p in model.parameters()]


def live_grads(skip: pk.SparseBackward, *inputs: Tensor) -> list[Tensor | None]:
    leaves = [leaf for leaf in skip.leaves if leaf is not None]
    return skip.compact(torch.autograd.grad(loss_of(skip.model(*inputs)), leaves, allow_unused=True))


def live_part(dense: Tensor, mask: pk.SaliencyMask, name: str, like: Tensor) -> Tensor:
    """What `like` should be: the dense gradient, or its live values in row-major order."""
    if like.shape == dense.shape and like.numel() != mask.count_of(name):
        return dense
    return dense if like.shape == dense.shape else dense[mask.bool(name).to(dense.device)]


def check_against(skip, mask, found, dense, tolerance=None, prefix=""):
    """Every live weight of a trained parameter has its dense gradient, dead parameters have none. Without a tolerance:
    to the last bits of float64."""
    compared, largest = 0, max(float(d.abs().max()) for d in dense if d is not None)
    for (name, p), g, d in zip(skip.model.named_parameters(), found, dense, strict=True):
        name = prefix + name
        if d is None or mask.count_of(name) == 0:
            assert g is None, name
            continue
        assert g is not None, name
        assert g.dtype == p.dtype
        assert g.shape == p.shape or g.shape == (mask.count_of(name),), name
        expected = live_part(d, mask, name, g)
        if tolerance is None:
            tolerance = 1e-12 if p.dtype == torch.float64 else 1e-5
        # Some gradients, as of the bias of an attention's keys, are zero but for rounding.
        size = float(expected.abs().max()) + 1e-3 * largest
        error = float((g - expected).abs().max())
        assert error <= tolerance * size, f"{name}: error {error:.3g} of {size:.3g}"
        compared += g.numel()
    assert compared
