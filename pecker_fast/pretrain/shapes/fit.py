"""The loop that all three networks of the shapes pipeline are trained by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pecker_fast.machine import StopFlag
from pecker_fast.pretrain.progress import Ticker
from pecker_fast.pretrain.settings import Settings, lr_at
from pecker_fast.pretrain.train import TrainState


def fit(
    what: str,
    state: TrainState,
    loss_at: Callable[[int], Tensor],
    settings: Settings,
    save: Callable[[dict[str, Tensor], int], None] | None = None,
) -> None:
    """Train `state` in place up to `settings.steps`; afterwards its network holds the averaged weights.

    what: name for the console. loss_at: the loss of a step, a function of the step and the weights alone.
    save: called with the state's tensors and the step, every `checkpoint_every` steps, on a signal and at the end.
    Raises `Interrupted` after a signal, state saved.
    """
    parameters = list(state.unet.parameters())
    state.unet.train()
    recent: list[Tensor] = []
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
            if save and (stop.signum or state.step % settings.checkpoint_every == 0 or state.step == settings.steps):
                save(state.tensors(), state.step)
            kept = f"step {state.step}" if save else "the parts that are finished"
            stop.check(
                f"the {what} is at step {state.step} of {settings.steps}; the same command continues after {kept}"
            )
    with torch.no_grad():
        for parameter, average in zip(parameters, state.ema):
            parameter.copy_(average)
    state.unet.eval().requires_grad_(False)
