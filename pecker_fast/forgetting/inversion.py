"""Condition inversion: vectors fitted, with all weights frozen, until a network draws given images under them.

The adversary of training and the audit share this, and nothing else: neither seeds nor starts nor budgets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast.forgetting.losses import generate, noise_loss
from pecker_fast.networks import Denoiser

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's


@dataclass
class Vectors:
    """K free vectors and Adam's state over them, with a step count for each: one can start afresh while the others go on."""

    values: Tensor  # [K, ...], float32
    first: Tensor  # moments, like values
    second: Tensor
    steps: Tensor  # [K], float32

    @classmethod
    def start(cls, values: Tensor) -> "Vectors":
        """Vectors at `values`, which are copied."""
        values = values.detach().float().clone()
        return cls(values, torch.zeros_like(values), torch.zeros_like(values), torch.zeros(len(values)).to(values))

    def tensors(self) -> dict[str, Tensor]:
        """All of the state, by name."""
        return dict(vars(self))

    @torch.no_grad()
    def restart_(self, k: int, value: Tensor) -> None:
        """Vector k begins again at `value`."""
        self.values[k].copy_(value)
        for tensor in (self.first, self.second, self.steps):
            tensor[k].zero_()

    @torch.no_grad()
    def step_(self, gradient: Tensor, rate: float | Tensor) -> None:
        """One step of Adam down the gradient [K, ...]; in place, and nothing waits for the device. rate: of all, or [K]."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        each = (-1, *(1 for _ in self.values.shape[1:]))
        of_each = self.steps.view(each)
        mean = self.first / (1 - BETAS[0] ** of_each)
        scale = (self.second / (1 - BETAS[1] ** of_each)).sqrt_().add_(EPS)
        self.values -= (rate.view(each) if isinstance(rate, Tensor) else rate) * mean / scale


def turns(count: int, n: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Which of `count` vectors each of n samples is drawn under, int64 [n]: all in turn, from `start` on."""
    return (torch.arange(start, start + n, device=device)) % count


def drawing_error(generator: Denoiser, z: Tensor, c: Tensor, target: Tensor, t_init: int | Tensor) -> Tensor:
    """Mean over pixels of (x_g − target)², [N]: how far the one-step generator's samples under conditions c are from images
    that another model drew of the same noise."""
    return (generate(generator, z, c, t_init) - target).square().flatten(1).mean(1)


def denoising_error(denoiser: Denoiser, images: Tensor, e: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Mean over pixels of (e − ε(x_t, t, c))² at x_t = a_t x + b_t e, [N]: how badly a denoiser explains images under c."""
    x_t = denoiser.schedule.add_noise(images, e, t)
    return noise_loss(denoiser.eps, x_t, e, t, c) / images[0].numel()


def error_gradient(vectors: Vectors, network: Denoiser, error: Callable[[Denoiser], Tensor]) -> tuple[Tensor, Tensor]:
    """(gradient [K, …] of Σ error [N], a function of the network that knows the vectors; the errors, detached).

    Weights get no gradient, whether or not they are frozen.
    """
    free = vectors.values.detach().requires_grad_(True)
    errors = error(network.with_free(free))
    (gradient,) = torch.autograd.grad(errors.sum(), free)
    return gradient, errors.detach()


def fit_step(vectors: Vectors, network: Denoiser, error: Callable[[Denoiser], Tensor], rate: float | Tensor) -> Tensor:
    """One step of all vectors down `error_gradient`; returns the errors, [N]."""
    gradient, errors = error_gradient(vectors, network, error)
    vectors.step_(gradient, rate)
    return errors


def near(values: Tensor, share: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Each of `values` [K, ...] moved by noise of `share` of its own size, a generator for each."""
    noise = torch.stack([torch.randn(values.shape[1:], generator=g, device=g.device) for g in generators]).to(values)
    size = values.square().flatten(1).mean(1).sqrt().view(-1, *(1 for _ in values.shape[1:]))
    return values + share * size * noise
