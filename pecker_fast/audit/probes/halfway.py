"""Half-way: images of the concept, partly noised, handed to the network to be finished."""

from __future__ import annotations

import torch
from torch import Tensor

from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.forgetting import batch_of, denoised

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
    e, looks = scene.noise("half-way", n), {}
    for name, c in under.items():
        for at, t in _times(subject).items():
            looks[f"{name}, {at}"] = scene.looked(
                subject,
                rows,
                lambda part, c=c, t=t: _finished(subject, x[part], e[part], c[part], t),  # type: ignore[misc]
            )
    return found_of(looks)


def _times(subject: Subject) -> dict[str, int]:
    if subject.t_init is not None:
        return {f"t = {subject.t_init}": subject.t_init}
    last = subject.network.schedule.num_timesteps - 1
    return {f"s = {share:g}": round(share * last) for share in SHARES}


@torch.no_grad()
def _finished(subject: Subject, x: Tensor, e: Tensor, c: Tensor, time: int) -> Tensor:
    """Samples of the network from x_t, [n, C, H, W]."""
    network = subject.network
    t = torch.full((len(x),), time, device=x.device)
    noised = network.schedule.add_noise(x, e, t)
    if subject.t_init is not None:
        return torch.cat([network.x0(*parts) for parts in zip(*(of.split(batch_of(network)) for of in (noised, t, c)))])
    pairs = zip(noised.split(batch_of(network)), c.split(batch_of(network)))
    return torch.cat([denoised(network, x_i, c_i, subject.steps, subject.guidance, time) for x_i, c_i in pairs])
