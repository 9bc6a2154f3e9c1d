"""Half-way: images of the concept, partly noised, handed to the network to be finished."""

from __future__ import annotations

import torch
from torch import Tensor

from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.forgetting import denoised

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9)  # of the schedule


def half_way(scene: Scene, subject: Subject) -> Finding:
    """A denoiser goes on from s of the schedule under the forgotten, the cover and the empty condition; a one-step generator is
    given the noised image at its own timestep, the only one it was trained at."""
    world, n = scene.world, min(scene.budget.samples, len(scene.pool.x))
    x, rows = scene.pool.x[:n], scene.pool.rows[:n]
    covers = dict(zip(world.forget, world.cover))
    under = {
        "forgotten condition": rows,
        "cover condition": torch.tensor([covers[row] for row in rows.tolist()], device=rows.device),
    }
    if world.null is not None:
        under["no condition"] = torch.full_like(rows, world.null)
    e = scene.noise("half-way", n)
    seen, images = {}, {}
    for name, c in under.items():
        for at, drawn in _finished(scene, subject, x, e, c):
            key = f"{name}, {at}"
            images[key] = subject.network.to_images(drawn)
            seen[key] = world.seen(images[key], rows)
    return found_of(seen, images, world, rows)


def _finished(scene: Scene, subject: Subject, x: Tensor, e: Tensor, c: Tensor) -> list[tuple[str, Tensor]]:
    network, schedule = subject.network, subject.network.schedule
    if subject.t_init is not None:
        t = torch.full((len(x),), subject.t_init, device=x.device)
        with torch.no_grad():
            return [(f"t = {subject.t_init}", network.x0(schedule.add_noise(x, e, t), t, c))]
    found = []
    for share in SHARES:
        scene.poll()
        t = torch.full((len(x),), round(share * (schedule.num_timesteps - 1)), device=x.device)
        noised = schedule.add_noise(x, e, t)
        found.append((f"s = {share:g}", denoised(network, noised, c, subject.steps, subject.guidance, int(t[0]))))
    return found
