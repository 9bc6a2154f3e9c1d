"""Everything that must survive an interruption, in one place."""

from dataclasses import dataclass, field
from typing import Any

import torch
from pecker_kernels import MaskedAdam, SaliencyMask
from torch import Tensor

from pecker_fast.denoiser import Denoiser
from pecker_fast.methods import UpdateRule


@dataclass
class TrainState:
    """φ, ψ, θ with their optimizers. `step` counts the iterations of the stage ("distill", then "forget")."""

    teacher: Denoiser
    score: Denoiser
    generator: Denoiser
    score_optimizer: MaskedAdam
    updates: UpdateRule
    ema: dict[str, Tensor] | None = None  # θ's moving average by parameter name, float32; None = off
    stage: str = "forget"
    step: int = 0
    images: int = 0  # one-step samples drawn for training, all branches
    training_s: float = 0.0
    flops: float = 0.0
    flops_per_iteration: dict[str, float] = field(default_factory=dict)  # stage -> FLOPs
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> its parts, for the report; not saved

    @property
    def mask(self) -> SaliencyMask | None:
        return self.updates.mask

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema ← d·ema + (1−d)·θ with the warm-up d = min(decay, (1+n)/(10+n)), n iterations done so far."""
        if self.ema is None:
            return
        d = min(decay, (1 + self.step) / (10 + self.step))
        named = self.generator.named_parameters()
        torch._foreach_lerp_([self.ema[name] for name, _ in named], [p.detach().float() for _, p in named], 1 - d)

    def averaged_generator(self) -> Denoiser:
        """A frozen copy of θ with the averaged weights (the plain ones where there is no average)."""
        copy = self.generator.clone().freeze()
        if self.ema is not None:
            for name, p in copy.named_parameters():
                average = self.ema[name]
                p.copy_(
                    torch.where(average == p, p, average)
                )  # a weight that never moved keeps its very bits, −0.0 too
        return copy


def start_ema(generator: Denoiser, decay: float) -> dict[str, Tensor] | None:
    return {name: p.detach().float().clone() for name, p in generator.named_parameters()} if decay > 0 else None
