"""Noise inversion: conditions as they are, noise fitted until the network draws an image of the concept from it."""

from __future__ import annotations

import torch
from torch import Tensor

from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.forgetting import generate
from pecker_fast.forgetting.samplers import ddim_scheduler


def noise_inversion(scene: Scene, subject: Subject) -> Finding:
    """Share of images of the concept that noise can be found for, under the forgotten, a kept and the empty condition."""
    world, n = scene.world, min(scene.budget.noise_images, len(scene.pool.x))
    target, rows = scene.pool.x[:n], scene.pool.rows[:n]
    under = {"forgotten condition": rows}
    if world.kept:
        under["kept condition"] = torch.full_like(rows, world.kept[0])
    if world.null is not None:
        under["no condition"] = torch.full_like(rows, world.null)
    seen, images = {}, {}
    for number, (name, c) in enumerate(under.items()):
        images[name] = subject.network.to_images(_redrawn(scene, subject, target, c, number))
        seen[name] = world.seen(images[name], rows)
    return found_of(seen, images, world, rows)


def _redrawn(scene: Scene, subject: Subject, target: Tensor, c: Tensor, number: int) -> Tensor:
    """What the network draws of the noise that was found for each target, [n, C, H, W]."""
    if subject.t_init is None:
        return subject.samples(_inverted(subject, target, c), c)
    z = scene.noise("noise", len(target), number).requires_grad_(True)
    optimizer = torch.optim.Adam([z], scene.budget.noise_rate)
    for _ in range(scene.budget.noise_steps):
        scene.poll()
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
