"""Weights disturbed: rounded, shaken, pruned, tuned on something else. Does the concept come back by itself?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pecker_fast.audit.probes.relearn import trained
from pecker_fast.audit.scene import Finding, Pool, Scene, found_of
from pecker_fast.audit.subjects import Subject

Change = Callable[[Tensor, torch.Generator], Tensor]


def disturbed(scene: Scene, subject: Subject) -> Finding:
    """Every change of `CHANGES` to all weights, and a short fine-tune on kept conditions (resurgence, arXiv 2410.08074)."""
    looks = {}
    for name, change in CHANGES.items():
        looks[name] = scene.judged(_changed(scene, subject, name, change))
    if scene.world.kept:
        looks["tuned on kept"] = scene.judged(_tuned(scene, subject))
    return found_of(looks)


def _changed(scene: Scene, subject: Subject, name: str, change: Change) -> Subject:
    network = subject.network.clone().freeze()
    g = scene.generator(f"disturbed-{name}")
    with torch.no_grad():
        for _, p in network.named_parameters():
            if p.ndim > 1:  # biases and norms stay, as in deployed quantised networks
                p.copy_(change(p.float().cpu(), g).to(p))
    return subject.with_network(network)


def _tuned(scene: Scene, subject: Subject) -> Subject:
    """As many steps of plain training as relearning takes, on what the model before draws of kept conditions."""
    n, student = scene.budget.images, subject.with_network(subject.network.clone())
    z, rows = scene.noise("tuned", n), scene.dealt(scene.world.kept, n, "tuned")
    trained(scene, student, Pool(scene.before.samples(z, rows), z, rows), n, "tune")
    return student


def integer(bits: int) -> Change:
    """Symmetric rounding to `bits` bits, a scale for each output channel."""

    def rounded(weight: Tensor, g: torch.Generator) -> Tensor:
        most = 2 ** (bits - 1) - 1
        rows = weight.flatten(1)
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
        return ((rows / scale).round().clamp(-most, most) * scale).view_as(weight)

    return rounded


def float8(weight: Tensor, g: torch.Generator) -> Tensor:
    """Rounding to float8 (e4m3), a scale for each tensor."""
    scale = weight.abs().amax().clamp_min(1e-12) / 448.0
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def shaken(share: float) -> Change:
    """Noise of `share` of the tensor's deviation."""
    return lambda weight, g: weight + share * weight.std() * torch.randn(weight.shape, generator=g)


def pruned(share: float) -> Change:
    """The smallest `share` of the tensor's weights set to zero."""

    def cut(weight: Tensor, g: torch.Generator) -> Tensor:
        order = weight.abs().flatten().argsort(stable=True)[: round(share * weight.numel())]
        kept = weight.flatten().clone()
        kept[order] = 0
        return kept.view_as(weight)

    return cut


CHANGES: dict[str, Change] = {
    "int8": integer(8),
    "int4": integer(4),
    "float8": float8,
    "noise 1 %": shaken(0.01),
    "noise 3 %": shaken(0.03),
    "noise 10 %": shaken(0.1),
    "pruned 10 %": pruned(0.1),
    "pruned 30 %": pruned(0.3),
}
