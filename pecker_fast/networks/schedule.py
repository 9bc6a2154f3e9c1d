"""Variance-preserving schedule: x_t = a_t x_0 + b_t e, and the conversions between noise, velocity and sample prediction."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast.networks import scheduler


@dataclass(frozen=True)
class Schedule:
    """a_t = √ᾱ_t and b_t = √(1−ᾱ_t), both float32 [T]; `config` is the diffusers scheduler config they came from, `clipping`
    how the model's own sampler bounds its x_0 (keys of DDIMScheduler).
    """

    a: Tensor
    b: Tensor
    prediction_type: str
    config: dict[str, Any]
    clipping: dict[str, Any] = field(default_factory=dict)

    @property
    def num_timesteps(self) -> int:
        return self.a.shape[0]

    def to(self, device: torch.device | str) -> "Schedule":
        return replace(self, a=self.a.to(device), b=self.b.to(device))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, b_t) of timesteps t [N], each [N, 1, 1, 1]."""
        return self.a[t].view(-1, 1, 1, 1), self.b[t].view(-1, 1, 1, 1)

    def add_noise(self, x_0: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x_0 + b_t e, all [N, C, H, W], t [N]."""
        a, b = self.coefficients(t)
        return a * x_0 + b * e

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """f(x_t, c): the conditional mean of x_0 (Tweedie) from the network's output, [N, C, H, W]."""
        if self.prediction_type == "sample":
            return output
        a, b = self.coefficients(t)
        if self.prediction_type == "epsilon":
            return (x_t - b * output) / a
        return a * x_t - b * output

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The predicted noise from the network's output, [N, C, H, W]."""
        if self.prediction_type == "epsilon":
            return output
        a, b = self.coefficients(t)
        if self.prediction_type == "sample":
            return (x_t - a * output) / b
        return b * x_t + a * output


def load_schedule(folder: Path) -> Schedule:
    """Read `scheduler_config.json` of a diffusers scheduler folder. Raises ModelError for anything it cannot follow exactly."""
    path, config, kind = scheduler.read_scheduler(folder)
    betas, kept = scheduler.betas_of(path, config, kind)
    prediction_type = config.get("prediction_type") or "epsilon"
    # in float64: 1 − ᾱ_t of the scheduler's own float32 product has lost digits at small t
    alphas_cumprod = (1 - betas.double()).cumprod(0)
    a, b = alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()
    scheduler.check_signal(path, a, prediction_type)
    return Schedule(a, b, prediction_type, kept, scheduler.clipping_of(config, kind))
