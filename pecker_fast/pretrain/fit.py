"""The loop that every network of pretraining is trained by, its average and its resumable state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pecker_fast.errors import CheckpointError, NonFiniteError
from pecker_fast.machine import StopFlag
from pecker_fast.networks import are_weights
from pecker_fast.pretrain.output import load_partial, save_partial
from pecker_fast.pretrain.progress import Ticker
from pecker_fast.pretrain.settings import Settings, lr_at

MOMENTS = ("exp_avg", "exp_avg_sq")
SAVE_S = 180.0  # seconds of work at most that a kill takes
Save = Callable[[dict[str, Tensor], int], None]


@dataclass
class TrainState:
    """All that must survive: weights, their average, the optimizer's moments and the number of steps done."""

    network: nn.Module
    ema: list[Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0

    @classmethod
    def fresh(cls, network: nn.Module, settings: Settings) -> TrainState:
        optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
        return cls(network, [p.detach().clone() for p in network.parameters()], optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Flat dictionary for a safetensors file."""
        out: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.network.named_parameters(), self.ema):
            moments = self.optimizer.state.get(parameter, {})
            out |= {f"unet/{name}": parameter.detach(), f"ema/{name}": average}
            out |= {f"{key}/{name}": value for key, value in moments.items()}
        return out

    def check(self, what: str) -> None:
        """Raises NonFiniteError where weights, average or moments are none that training can go on from."""
        for name, tensor in self.tensors().items():
            if not are_weights(tensor):
                raise NonFiniteError(
                    f"{what} step {self.step}: tensor {name} holds NaN, infinity or absurd numbers; it was not saved, and what was "
                    "saved before is as it was; give a larger batch, or another seed"
                )

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from `tensors()` of an earlier run. Raises `CheckpointError` where they are another network's."""
        state = {}
        try:
            with torch.no_grad():
                for i, (name, parameter) in enumerate(self.network.named_parameters()):
                    parameter.copy_(tensors[f"unet/{name}"])
                    self.ema[i].copy_(tensors[f"ema/{name}"])
                    # in the parameter's memory format: the fused step pairs elements by place in memory
                    moments = {k: torch.empty_like(parameter).copy_(tensors[f"{k}/{name}"]) for k in MOMENTS}
                    state[i] = {"step": tensors[f"step/{name}"], **moments}
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the saved training state does not fit this network: {error}") from error
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = step


def resumable(folder: Path, part: str, network: nn.Module, settings: Settings) -> tuple[TrainState, Save, int | None]:
    """State of a part of the model in `folder`: fresh, or as an interrupted run has saved it; how to save it; the step that was
    saved, None where there was none."""
    state = TrainState.fresh(network, settings)
    saved = load_partial(folder, part)
    if saved:
        state.load(*saved)
    return state, lambda tensors, step: save_partial(folder, tensors, step, part), saved[1] if saved else None


def fit(
    what: str,
    state: TrainState,
    loss_at: Callable[[int], Tensor],
    settings: Settings,
    save: Save | None = None,
    resumed: Callable[[int], str] | None = None,
) -> None:
    """Train `state` in place up to `settings.steps`; afterwards its network holds the averaged weights, frozen.

    what: name for the console. loss_at: the loss of a step, a function of the step and the weights alone.
    save: called with the state's tensors and the step, every `checkpoint_every` steps and every `SAVE_S` seconds, on a signal
    and at the end.
    resumed: what a signal after so many steps is answered with; None = where the same command goes on.
    Raises `Interrupted` after a signal, state saved.
    """

    def goes_on(step: int) -> str:
        kept = f"step {step}" if save else "the parts that are finished"
        return f"the {what} is at step {step} of {settings.steps}; the same command continues after {kept}"

    resumed = resumed or goes_on
    parameters = list(state.network.parameters())
    state.network.train()
    recent: list[Tensor] = []
    saved_s = time.monotonic()
    with StopFlag() as stop, Ticker(what, settings.steps, state.step) as ticker:
        while state.step < settings.steps:
            loss = loss_at(state.step)
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
            due = state.step % settings.checkpoint_every == 0 or time.monotonic() - saved_s >= SAVE_S
            ends = state.step == settings.steps
            if ends or (save and (stop.signum or due)):
                state.check(what)
            if save and (stop.signum or due or ends):
                save(state.tensors(), state.step)
                saved_s = time.monotonic()
            stop.check(resumed(state.step))
    with torch.no_grad():
        for parameter, average in zip(parameters, state.ema):
            parameter.copy_(average)
    state.network.eval().requires_grad_(False)
