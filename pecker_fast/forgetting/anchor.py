"""Elastic springs: weights are held where they were, each by how much it matters to what is kept (EWC)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pecker_fast.forgetting.saliency import SaliencyPass, batches_of
from pecker_fast.forgetting.updates import Gradients
from pecker_fast.networks import Denoiser


@dataclass(frozen=True)
class Anchor:
    """Σ_i F_i (θ_i − θ_i⁰)²: by parameter, in order. F is the mean over groups of samples of their squared gradient."""

    parameters: list[nn.Parameter]
    start: list[Tensor]
    weight: list[Tensor]

    @torch.no_grad()
    def pull(self, strength: float, gradients: Gradients | None) -> Gradients:
        """The gradients with those of λ Σ F (θ − θ⁰)²: 2 λ F (θ − θ⁰). None counts as zero."""
        away = torch._foreach_sub([p.detach().float() for p in self.parameters], self.start)
        torch._foreach_mul_(away, self.weight)
        torch._foreach_mul_(away, 2 * strength)
        pulls = [pull.to(p.dtype) for pull, p in zip(away, self.parameters)]
        if gradients is None:
            return pulls
        return [pull if g is None else g + pull for g, pull in zip(gradients, pulls)]

    def tensors(self) -> list[Tensor]:
        """What lies in memory beside the networks."""
        return [*self.start, *self.weight]


def anchor_of(found: SaliencyPass, teacher: Denoiser, generator: Denoiser) -> Anchor:
    """Springs on θ from a pass over kept samples at the weights of φ, where θ started."""
    scores = found.scores("retain", "square")
    count = batches_of(found.recipe)
    weight = {name: score / count for name, score in scores.named_scores()}
    parameters = [p for _, p in generator.named_parameters()]
    start = [p.detach().float().clone() for _, p in teacher.named_parameters()]
    return Anchor(parameters, start, [weight[name] for name, _ in generator.named_parameters()])
