"""The checks that every kernel has to pass; each is shown to fail on a broken kernel somewhere in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pecker_kernels as pk
import torch
from pecker_kernels import dispatch
from torch import Tensor

RAGGED = (0, 1, 7, 8, 9, 63, 64, 65, 513, 1_000_003)


def block_sizes() -> list[str]:
    """Block sizes that the Triton cases run with; the interpreter takes its time over each."""
    return ["small blocks"] if dispatch.interpreted() else ["small blocks", "as launched"]


def ulp(x: Tensor) -> Tensor:
    """Distance from |x| to the next larger number of its dtype, as float64."""
    x = x.abs()
    return (torch.nextafter(x, torch.full_like(x, float("inf"))).double() - x.double()).double()


def check_accuracy(kernel: Tensor, peer: Tensor, truth: Tensor) -> None:
    """|kernel - f64| ≤ 2·|torch in the same dtype - f64| + 4 ulp of the result, elementwise."""
    assert kernel.dtype == peer.dtype
    assert truth.dtype == torch.float64
    error = (kernel.double() - truth).abs()
    allowed = 2 * (peer.double() - truth).abs() + 4 * ulp(truth.to(kernel.dtype))
    assert bool((error <= allowed).all()), (
        f"error {float(error.max()):.3g}, {int((error > allowed).sum())} values too far"
    )


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Matrices, a convolution, vectors, a scalar and a parameter without a gradient."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3), torch.nn.GroupNorm(3, 9), torch.nn.Linear(5, 13))
    model.scale = torch.nn.Parameter(torch.tensor(0.5))
    model.unused = torch.nn.Parameter(torch.randn(11))
    return model.to(dtype)


def fill_grads(model: torch.nn.Module, seed: int, skip: Iterable[str] = ("unused",)) -> dict[str, Tensor]:
    """Random gradients of very different sizes, zeros among them; returned by name too."""
    generator = torch.Generator().manual_seed(seed)
    grads = {}
    for name, p in model.named_parameters():
        if name in skip:
            continue
        g = torch.randn(p.shape, generator=generator) * 10 ** (torch.rand(p.shape, generator=generator) * 8 - 6)
        g = torch.where(torch.rand(p.shape, generator=generator) < 0.1, torch.zeros_like(g), g)
        p.grad = g.to(p.dtype)
        grads[name] = p.grad.clone()
    return grads


def updates_and_moments(
    make: Callable[[torch.nn.Module], torch.optim.Optimizer],
    dtype: torch.dtype,
    steps: int = 4,
    keep: Callable[[str], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(what, value) over a few steps: the update (p_new - p_old) / lr from zero, where it is exact, and the moments.

    keep: by name, the bool mask that gradients are multiplied with first.
    """
    model = small_model(dtype=dtype)
    optimizer = make(model)
    for i in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        fill_grads(model, seed=i)
        for name, p in model.named_parameters():
            if keep is not None and p.grad is not None:
                p.grad *= keep(name)
        optimizer.step()
        lr = optimizer.param_groups[0]["lr"]
        dense = optimizer.densify() if isinstance(optimizer, pk.MaskedAdam) else optimizer.state_dict()
        for j, (name, p) in enumerate(model.named_parameters()):
            yield f"update {i} {name}", p.detach() / lr
            if j in dense["state"]:
                yield f"exp_avg {i} {name}", dense["state"][j]["exp_avg"].clone()
                yield f"exp_avg_sq {i} {name}", dense["state"][j]["exp_avg_sq"].clone()


def check_untouched(model: torch.nn.Module, before: dict[str, Tensor], mask: pk.SaliencyMask) -> None:
    """Every weight outside the mask has the bits it had before."""
    for name, p in model.named_parameters():
        outside = ~mask.bool(name)
        now, then = p.detach()[outside].view(torch.uint8), before[name][outside].view(torch.uint8)
        assert torch.equal(now, then), f"masked-out weights of {name} were written"


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check_sums(kernel: Tensor, peer: Tensor, truth: Tensor, scale: Tensor) -> None:
    """check_accuracy for sums of products: scale, float64, is the sum of their magnitudes, whose rounding (float32 at the
    coarsest) no order of summation avoids, so 4 ulp of it are allowed too."""
    assert kernel.dtype == peer.dtype
    assert kernel.shape == peer.shape == truth.shape == scale.shape
    work = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    error = (kernel.double() - truth).abs()
    allowed = 2 * (peer.double() - truth).abs() + 4 * (ulp(truth.to(kernel.dtype)) + ulp(scale.to(work)))
    assert bool((error <= allowed).all()), (
        f"error {float(error.max()):.3g}, {int((error > allowed).sum())} of {error.numel()} values too far"
    )
