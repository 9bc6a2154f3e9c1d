"""Everything that must survive an interruption, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pecker_kernels import MaskedAdam, SaliencyMask
from torch import Tensor

from pecker_fast.forgetting import Adversary, Anchor, Pool, UpdateRule
from pecker_fast.networks import AdaptedUNet, Denoiser
from pecker_fast.recipe import LearningRates


@dataclass
class TrainState:
    """φ, ψ, θ with their optimizers. `step` counts the iterations of the stage ("distill", then "forget")."""

    teacher: Denoiser
    score: Denoiser | None  # of methods that make a one-step generator
    generator: Denoiser
    score_optimizer: MaskedAdam | None
    updates: UpdateRule
    ema: dict[str, Tensor] | None = None  # θ's moving average by parameter name, float32; None = off
    adversary: Adversary | None = None  # of the forget stage, where the recipe has one
    pool: Pool | None = None  # of methods that leave a model of many steps: what they learn from
    anchor: Anchor | None = None  # what holds weights where they were; made again by a resumed run
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

    @property
    def optimizers(self) -> dict[str, MaskedAdam]:
        """All optimizers by name, in checkpoint order."""
        score = {} if self.score_optimizer is None else {"score": self.score_optimizer}
        return {**score, **self.updates.optimizers}

    @property
    def networks_by_name(self) -> dict[str, Denoiser]:
        """φ, ψ where there is one, θ."""
        score = {} if self.score is None else {"score": self.score}
        return {"teacher": self.teacher, **score, "generator": self.generator}

    def set_learning_rates(self, lr: LearningRates, device: torch.device | None = None) -> None:
        """This step's rates, a function of `step` alone; device: as numbers that live there and keep their place."""
        share = min(1.0, (self.step + 1) / lr.warmup) if lr.warmup else 1.0
        for name, optimizer in self.optimizers.items():
            rate = share * (lr.score if name == "score" else lr.generator)
            for group in optimizer.param_groups:
                held = group["lr"]
                if device is None:
                    group["lr"] = rate
                elif isinstance(held, Tensor) and _same_device(held.device, device):
                    held.fill_(rate)  # a captured graph reads it there
                else:
                    group["lr"] = torch.full((), rate, dtype=torch.float64, device=device)

    def ema_decay(self, decay: float) -> float:
        """d of this iteration, with the warm-up min(decay, (1+n)/(10+n)), n iterations done so far."""
        return min(decay, (1 + self.step) / (10 + self.step))

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema ← d·ema + (1−d)·θ with d = ema_decay(decay)."""
        if self.ema is not None:
            averages, weights = self._ema_pairs(self.ema)
            torch._foreach_lerp_(averages, weights, 1 - self.ema_decay(decay))

    @torch.no_grad()
    def blend_ema(self, weight: Tensor) -> None:
        """ema ← ema + weight·(θ − ema), weight 0-dim on the device and read there; 0 changes no bit of it."""
        if self.ema is not None:
            averages, weights = self._ema_pairs(self.ema)
            # 12 bytes a weight, and no copy of the change
            torch._foreach_lerp_(averages, weights, [weight] * len(averages))

    def _ema_pairs(self, ema: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        named = self.generator.named_parameters()
        return [ema[name] for name, _ in named], [p.detach().float() for _, p in named]

    def averaged_generator(self) -> Denoiser:
        """A frozen copy of θ with the averaged weights, adapters merged into it; θ itself where there is no average."""
        if self.ema is None:
            return self.generator.without_adapters()
        copy = self.generator.clone().freeze()
        blend_average(copy, self.ema)
        return copy.without_adapters()

    def whole_generator(self) -> Denoiser:
        """θ with weights that have gradients of their own: of adapters a trainable network with them in it."""
        plain = self.generator.without_adapters()
        if plain is not self.generator:
            plain.unet.requires_grad_(True)
        return plain

    def limit(self, mask: SaliencyMask | None) -> None:
        """Before the first step of adapters: their products count where the mask says, and those it leaves nothing of are gone."""
        if mask is None or not isinstance(self.generator.unet, AdaptedUNet):
            return
        self.generator.unet.restrict(mask.bool)
        if self.ema is not None:
            self.ema = {name: self.ema[name] for name, _ in self.generator.named_parameters()}

    def release(self) -> None:
        """Let go of moments and average: another state takes over."""
        self.ema = None
        for optimizer in self.optimizers.values():
            optimizer.state.clear()


def _same_device(one: torch.device, other: torch.device) -> bool:
    """A tensor made on "cuda" says that it is on "cuda:0"."""
    return one.type == other.type and (one.index is None or other.index is None or one.index == other.index)


@torch.no_grad()
def blend_average(generator: Denoiser, average: Mapping[str, Tensor]) -> None:
    """θ ← its average, by parameter name; a weight that never moved keeps its very bits, −0.0 too."""
    for name, p in generator.named_parameters():
        p.copy_(torch.where(average[name] == p, p, average[name]))


def start_ema(generator: Denoiser, decay: float) -> dict[str, Tensor] | None:
    return {name: p.detach().float().clone() for name, p in generator.named_parameters()} if decay > 0 else None
