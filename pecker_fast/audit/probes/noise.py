"""Noise inversion: conditions as they are, noise fitted until the network draws an image of the concept from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pecker_fast.audit.scene import Finding, Scene, always, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import Look
from pecker_fast.forgetting import ddim_scheduler, generate


def noise_inversion(scene: Scene, subject: Subject) -> Finding:
    """Share of images of the concept that noise can be found for, under the forgotten, a kept and the empty condition."""
    world = scene.world
    under: dict[str, Callable[[Tensor], Tensor]] = {"forgotten condition": lambda rows: rows}
    others = {"kept condition": world.kept[0] if world.kept else None, "no condition": world.null}
    for name, row in others.items():
        if row is not None:
            under[name] = always(row)
    return found_of({name: noise_found(scene, subject, c, number) for number, (name, c) in enumerate(under.items())})


def noise_found(scene: Scene, subject: Subject, codes: Callable[[Tensor], Tensor], number: int) -> Look:
    """What is seen in what the network draws of the noise that was found for images of the pool. codes: conditions, of their
    rows. number: of the noise it starts from."""
    n = min(scene.budget.noise_images, len(scene.pool.x))
    target, rows = scene.pool.x[:n], scene.pool.rows[:n]
    start, c = scene.noise("noise", n, number), codes(rows)

    def drawn(part: slice) -> Tensor:
        return _redrawn(scene, subject, target[part], c[part], start[part])

    return scene.looked(subject, rows, drawn)


def _redrawn(scene: Scene, subject: Subject, target: Tensor, c: Tensor, start: Tensor) -> Tensor:
    """What the network draws of the noise that was found for each target, [n, C, H, W]."""
    if subject.t_init is None:
        return subject.samples(_inverted(subject, target, c), c)
    z = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], scene.budget.noise_rate)
    for _ in range(scene.budget.noise_steps):
        error = (generate(subject.network, z, c, subject.t_init) - target).square().flatten(1).mean(1).sum()
        (z.grad,) = torch.autograd.grad(error, z)
        optimizer.step()
    return subject.samples(z.detach(), c)


@torch.no_grad()
def _inverted(subject: Subject, x: Tensor, c: Tensor) -> Tensor:
    """DDIM run backwards (arXiv 2105.05233, appendix F): the noise from which its steps lead to x, [n, C, H, W]."""
    network = subject.network
    times = [int(t) for t in reversed(ddim_scheduler(network, subject.steps).timesteps)]
    x = x.to(network.device)
    before = 0
    for t in times:
        at = torch.full((len(x),), before, device=x.device)
        eps = network.eps(x, at, c, subject.guidance)
        a, b = network.schedule.coefficients(at)
        a_next, b_next = network.schedule.coefficients(torch.full_like(at, t))
        x, before = a_next * (x - b * eps) / a + b_next * eps, t
    return x
