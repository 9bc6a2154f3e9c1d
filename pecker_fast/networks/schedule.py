"""Variance-preserving schedule: x_t = a_t x_0 + b_t e, and the conversions between noise, velocity and sample prediction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.errors import ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """a_t = √ᾱ_t and b_t = √(1−ᾱ_t), both float32 [T]; `config` is the diffusers scheduler config they came from."""

    a: Tensor
    b: Tensor
    prediction_type: str
    config: dict[str, Any]

    @property
    def num_timesteps(self) -> int:
        return self.a.shape[0]

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(self.a.to(device), self.b.to(device), self.prediction_type, self.config)

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
    from diffusers import DDPMScheduler

    path = folder / "scheduler_config.json"
    config = files.read_json(path, error=ModelError)
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ModelError(
            f"{path}: prediction_type {prediction_type!r} is not supported (one of {', '.join(PREDICTION_TYPES)})"
        )
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    betas = {key: config[key] for key in kept if config.get(key) is not None}
    try:
        scheduler = DDPMScheduler(**betas, prediction_type=prediction_type)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a schedule diffusers knows ({error})") from error
    # in float64: 1 − ᾱ_t of the scheduler's own float32 product has lost digits at small t
    alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    return Schedule(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), prediction_type, betas)
