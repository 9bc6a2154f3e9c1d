"""Relearning: a few images of the concept shown again, all weights trained; how soon is it back?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pecker_fast.audit.probes.conditions import steps_to_half
from pecker_fast.audit.scene import Finding, Pool, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import Look
from pecker_fast.forgetting import denoising_error, drawing_error
from pecker_fast.networks import Denoiser


def relearning(scene: Scene, subject: Subject) -> Finding:
    """Plain training on 1, 5, … or all images of the pool, under the forgotten condition."""
    budget = scene.budget
    rows = scene.dealt(scene.world.judged, budget.samples, "judged")
    looks: dict[str, Look] = {}
    curves: dict[str, list[list[float]]] = {}
    for count in budget.relearn_images:
        name = f"{count or 'all'} image{'s' if count != 1 else ''}"
        student = subject.with_network(subject.network.clone())
        curve = curves.setdefault(name, [])

        def looked(step: int, student: Subject = student, name: str = name, curve: list[list[float]] = curve) -> None:
            looks[name] = scene.judged(student, rows=rows)
            curve.append([step, looks[name].share])

        trained(scene, student, scene.pool, count or len(scene.pool.x), "relearn", looked)
    return found_of(looks, curves=curves, to_half=steps_to_half(curves.values()))


def trained(
    scene: Scene, student: Subject, pool: Pool, count: int, what: str, looked: Callable[[int], Any] = lambda step: None
) -> None:
    """Train the student's weights in place on the first `count` images of the pool; `looked` is called at the budget's marks.
    what: names the draws."""
    budget = scene.budget
    parameters = list(student.network.unet.parameters())
    optimizer = torch.optim.Adam(parameters, budget.relearn_rate)
    marks = budget.marks(budget.relearn_steps)
    for step in range(budget.relearn_steps + 1):
        if step in marks:
            looked(step)
        if step == budget.relearn_steps:
            return
        g = scene.generator(what, step)
        index = torch.randint(min(count, len(pool.x)), (budget.relearn_batch,), generator=g).to(pool.x.device)
        error = error_on(student, pool.x[index], pool.z[index], pool.rows[index], g)
        for p, grad in zip(parameters, torch.autograd.grad(error.mean(), parameters, allow_unused=True)):
            p.grad = grad
        optimizer.step()


def error_on(subject: Subject, x: Tensor, z: Tensor, c: Tensor, g: torch.Generator) -> Tensor:
    """What plain training takes down, [N]: the one-step generator's error at the same noise, a denoiser's at noise of its own."""
    network: Denoiser = subject.network
    if subject.t_init is not None:
        return drawing_error(network, z, c, x, subject.t_init)
    t = torch.randint(network.schedule.num_timesteps, (len(x),), generator=g).to(x.device)
    e = torch.randn(x.shape, generator=g).to(x.device)
    return denoising_error(network, x, e, t, c)
