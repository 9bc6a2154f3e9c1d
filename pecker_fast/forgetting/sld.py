"""Safe latent diffusion (arXiv 2211.05105): no weight moves, samples are guided away from a concept as they are drawn.

A yardstick of comparisons: whoever has the weights leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast.forgetting.samplers import batch_of, ddim_scheduler, sample_noise
from pecker_fast.networks import Denoiser


@dataclass(frozen=True)
class Sld:
    """s_S, δ (steps), λ, s_m and β_m of the paper; the values that comparisons use."""

    scale: float = 2000.0
    warmup: int = 7
    threshold: float = 0.025
    momentum: float = 0.4
    beta: float = 0.4


def away(e_p: Tensor, e_0: Tensor, e_s: Tensor, held: Tensor, options: Sld) -> tuple[Tensor, Tensor]:
    """(γ, the next ν) from what is predicted under prompt, nothing and concept, and ν so far (Eq. 4, 6 to 8), [N, C, H, W] each."""
    strength = ((e_p - e_s).abs() * options.scale).clamp(max=1.0)
    strength = torch.where(e_p - e_s >= options.threshold, 0.0, strength)
    gamma = (e_s - e_0) * strength + options.momentum * held
    return gamma, options.beta * held + (1 - options.beta) * gamma


@torch.no_grad()
def sld_sample(
    denoiser: Denoiser, labels: Tensor, concept: int, steps: int, seed: int, guidance: float = 1.0, options: Sld = Sld(),
) -> Tensor:  # fmt: skip
    """Images [N, C, H, W] for conditions [N], by `ddim_sample`'s sampler and noise. concept: the condition that is steered away
    from. guidance: s_g. The model needs an empty condition (`null_class`)."""
    z = sample_noise(denoiser, len(labels), seed)
    size = max(1, batch_of(denoiser) // 3)
    parts = zip(z.split(size), labels.to(denoiser.device).split(size))
    return torch.cat(
        [denoiser.to_images(_denoised(denoiser, x, c, concept, steps, guidance, options)) for x, c in parts]
    )


def _denoised(
    denoiser: Denoiser, x: Tensor, c: Tensor, concept: int, steps: int, guidance: float, options: Sld
) -> Tensor:
    scheduler, n = ddim_scheduler(denoiser, steps), len(x)
    assert denoiser.null_class is not None
    nothing, unwanted = (torch.full_like(c, condition) for condition in (denoiser.null_class, concept))
    held = torch.zeros_like(x)
    for i, t in enumerate(scheduler.timesteps):
        at = t.to(x.device).expand(n)
        every = denoiser.output(x.repeat(3, 1, 1, 1), at.repeat(3), torch.cat([c, nothing, unwanted]))
        e_p, e_0, e_s = every.chunk(3)
        gamma, held = away(e_p, e_0, e_s, held, options)
        direction = e_p - e_0 - gamma if i >= options.warmup else e_p - e_0
        x = scheduler.step(e_0 + guidance * direction, t, x).prev_sample
    return x
