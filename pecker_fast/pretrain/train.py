"""Noise-prediction training of the class-conditional teacher: the loop, its averages and its resumable state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.data import Dataset
from pecker_fast.errors import CheckpointError
from pecker_fast.machine import StopFlag
from pecker_fast.networks import Denoiser, Schedule
from pecker_fast.pretrain.progress import Ticker
from pecker_fast.pretrain.settings import Settings, lr_at

MOMENTS = ("exp_avg", "exp_avg_sq")
Save = Callable[[dict[str, Tensor], int], None]


@dataclass
class TrainState:
    """All that must survive: weights, their average, the optimizer's moments and the number of steps done."""

    unet: nn.Module
    ema: list[Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0

    @classmethod
    def fresh(cls, unet: nn.Module, settings: Settings) -> TrainState:
        optimizer = torch.optim.AdamW(unet.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
        return cls(unet, [p.detach().clone() for p in unet.parameters()], optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Flat dictionary for a safetensors file."""
        out: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.unet.named_parameters(), self.ema):
            moments = self.optimizer.state.get(parameter, {})
            out |= {f"unet/{name}": parameter.detach(), f"ema/{name}": average}
            out |= {f"{key}/{name}": value for key, value in moments.items()}
        return out

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `tensors()` of an earlier run. Raises `CheckpointError` where they are another network's."""
        state = {}
        try:
            with torch.no_grad():
                for i, (name, parameter) in enumerate(self.unet.named_parameters()):
                    parameter.copy_(tensors[f"unet/{name}"])
                    self.ema[i].copy_(tensors[f"ema/{name}"])
                    # in the parameter's memory format: the fused step pairs elements by place in memory
                    moments = {k: torch.empty_like(parameter).copy_(tensors[f"{k}/{name}"]) for k in MOMENTS}
                    state[i] = {"step": tensors[f"step/{name}"], **moments}
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the saved training state does not fit this network: {error}") from error
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = step


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
    """Train `state` in place up to `settings.steps`; afterwards the UNet holds the averaged weights.

    save: called with the state's tensors and the step, every `checkpoint_every` steps and on a signal.
    Raises `Interrupted` after a signal, state saved.
    """
    null_class = data.num_classes
    parameters = list(state.unet.parameters())
    denoiser = Denoiser(state.unet, schedule.to(parameters[0].device), null_class)
    state.unet.train()  # Denoiser switches to evaluation; dropout belongs to training
    recent: list[Tensor] = []
    cuda = [parameters[0].device] if parameters[0].device.type == "cuda" else []
    with StopFlag() as stop, Ticker("teacher", settings.steps, state.step) as ticker, torch.random.fork_rng(cuda):
        while state.step < settings.steps:
            if settings.dropout:
                torch.manual_seed(draws.generator(seed, "dropout", state.step).initial_seed())
            loss = noise_prediction_loss(denoiser, data, settings, seed, state.step, null_class)
            loss.backward()
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            for group in state.optimizer.param_groups:
                group["lr"] = lr_at(settings, state.step)
            state.optimizer.step()
            state.optimizer.zero_grad()
            decay = min(settings.ema, (1 + state.step) / (10 + state.step))
            torch._foreach_lerp_(state.ema, [p.detach() for p in parameters], 1 - decay)
            state.step += 1
            recent = [*recent[-99:], loss.detach()]
            if ticker.due(state.step):
                ticker.note(state.step, f"loss {torch.stack(recent).mean().item():.4f}")
            if save and (stop.signum or state.step % settings.checkpoint_every == 0 or state.step == settings.steps):
                save(state.tensors(), state.step)
            stop.check(f"the same command continues after step {state.step} of {settings.steps}")
    with torch.no_grad():
        for parameter, average in zip(parameters, state.ema):
            parameter.copy_(average)
    state.unet.eval()
