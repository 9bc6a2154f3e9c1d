"""Inputs and gates of the fused norm, for its C++, its reference and its Triton kernels."""

import pecker_kernels as pk
import torch
from kernel_gates import check_sums
from torch.nn import functional as F


def images(shape, dtype, last, device="cpu", seed=0):
    """(x, weight, bias, gradient of y): channels of very different size and place; last: channels last in memory."""
    n, channels, inner, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    ones = (1,) * len(inner)
    x = (draw(n, channels, *inner) * 3 + 2 * draw(1, channels, *ones)).to(dtype)
    grad = draw(n, channels, *inner).to(dtype)
    if last:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    return tuple(t.to(device) for t in (x, draw(channels).to(dtype), draw(channels).to(dtype), grad))


def norm_of(x, weight, bias, groups, silu=True, eps=1e-5):
    """torch's own two operations in the dtype of x."""
    u = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(u) if silu else u


def gradients(make, x, weight, bias, grad):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(True) for t in (x, weight, bias)]
    return torch.autograd.grad(make(*leaves), leaves, grad)


def magnitudes(x, weight, bias, groups):
    """([N, C, …] |terms of xhat|, |terms of u|, rstd), float64: a rounding of what is subtracted or added is of their size."""
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    wide = x.double()
    view = wide.reshape(x.shape[0], groups, -1)
    mean, rstd = view.mean(2), (view.var(2, correction=0) + 1e-5).rsqrt()
    mean, rstd = (t.repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *shape[2:]) for t in (mean, rstd))
    terms = rstd * (wide.abs() + mean.abs())
    return terms, weight.double().abs().view(shape) * terms + bias.double().abs().view(shape), rstd.expand_as(wide)


def check_forward(shape, dtype, last, impl, device="cpu", silu=True):
    """The tolerance rule for y, with impl against float64."""
    groups = shape[3]
    x, weight, bias, _ = images(shape, dtype, last, device)
    y = pk.group_norm_silu(x, weight, bias, groups, silu=silu, impl=impl)
    peer, truth = (norm_of(t, weight, bias, groups, silu) for t in (x, x.double()))
    check_sums(y, peer, truth, magnitudes(x, weight, bias, groups)[1])
    assert y.stride() == x.stride()


def check_way_back(shape, dtype, last, impl, device="cpu", silu=True):
    """The tolerance rule for the gradients of x, weight and bias, with impl against float64."""
    groups = shape[3]
    x, weight, bias, grad = images(shape, dtype, last, device)
    found = gradients(lambda *t: pk.group_norm_silu(*t, groups, silu=silu, impl=impl), x, weight, bias, grad)
    peer = gradients(lambda *t: norm_of(*t, groups, silu), x, weight, bias, grad)
    truth = gradients(lambda *t: norm_of(*t, groups, silu), *(t.double() for t in (x, weight, bias)), grad.double())
    of_xhat, of_u, rstd = magnitudes(x, weight, bias, groups)
    du = grad.double().abs() * (1 + of_u)
    by_group = (weight.double().abs().view(1, -1, *(1 for _ in x.shape[2:])) * du).reshape(x.shape[0], groups, -1)
    own = by_group.reshape(x.shape)
    means = by_group.mean(2).repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *(1 for _ in x.shape[2:]))
    inner = [d for d in range(x.dim()) if d != 1]
    scales = (rstd * (own + means * (1 + of_xhat) ** 2), (du * (1 + of_xhat)).sum(inner), du.sum(inner))
    for mine, theirs, true, scale in zip(found, peer, truth, scales, strict=True):
        check_sums(mine, theirs, true, scale)
    assert found[0].stride() == x.stride()


__all__ = ["check_forward", "check_way_back", "gradients", "images", "norm_of"]
