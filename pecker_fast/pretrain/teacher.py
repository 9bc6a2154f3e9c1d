"""Noise-prediction training of the class-conditional teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.data import Dataset
from pecker_fast.networks import Denoiser, Schedule
from pecker_fast.pretrain.fit import Save, TrainState, fit
from pecker_fast.pretrain.settings import Settings


def noise_prediction_loss(
    denoiser: Denoiser, data: Dataset, settings: Settings, seed: int, step: int, null_class: int
) -> Tensor:
    """E ‖e − ε(x_t, t, c)‖² per element over one batch (DDPM, arXiv 2006.11239, Eq. 14), a function of (seed, step).

    t ~ U{0 … T−1}; every label becomes the null class with the probability `label_dropout`.
    """
    g, n, device = draws.generator(seed, "pretrain", step), settings.batch_size, denoiser.device
    index = torch.randint(len(data), (n,), generator=g)
    x_0, labels = data.batch(index), data.labels[index]
    labels = torch.where(torch.rand(n, generator=g) < settings.label_dropout, null_class, labels)
    if settings.flip:
        x_0 = torch.where((torch.rand(n, generator=g) < 0.5).view(-1, 1, 1, 1), x_0.flip(3), x_0)
    t = torch.randint(denoiser.schedule.num_timesteps, (n,), generator=g)
    e = torch.randn(x_0.shape, generator=g)
    x_0, labels, t, e = (value.to(device, non_blocking=True) for value in (x_0, labels, t, e))
    return F.mse_loss(denoiser.output(denoiser.schedule.add_noise(x_0, e, t), t, labels), e)


def train_unet(
    state: TrainState, schedule: Schedule, data: Dataset, settings: Settings, seed: int, save: Save | None = None
) -> None:
    """`fit` the UNet in `state` to the data."""
    null_class = data.num_classes
    device = next(state.network.parameters()).device
    denoiser = Denoiser(state.network, schedule.to(device), null_class)

    def loss_at(step: int) -> Tensor:
        if settings.dropout:
            torch.manual_seed(draws.generator(seed, "dropout", step).initial_seed())
        return noise_prediction_loss(denoiser, data, settings, seed, step, null_class)

    def resumed(step: int) -> str:
        return f"the same command continues after step {step} of {settings.steps}"

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        fit("teacher", state, loss_at, settings, save, resumed)
