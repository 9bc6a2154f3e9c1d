"""Neighbours: what the kept conditions nearest to the concept have lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import NEIGHBOURS, SHOWN, Look, World
from pecker_fast.networks import TextDenoiser


def neighbours(scene: Scene, subject: Subject) -> Finding:
    """Share of the samples of the nearest kept conditions that are not what was asked for; the worst one counts."""
    world, n = scene.world, scene.budget.samples
    losses = {}
    for row in nearest(scene):
        rows = torch.full((n,), row, device=scene.before.network.device)
        z = scene.noise("neighbours", n, row)
        losses[world.name(row)] = scene.looked(subject, rows, _drawn(subject, z, rows), partial(_lost, world))
    return found_of(losses) if losses else Finding(None, why="nothing is kept")


def _drawn(subject: Subject, z: Tensor, rows: Tensor) -> Callable[[slice], Tensor]:
    return lambda part: subject.samples(z[part], rows[part])


def _lost(world: World, images: Tensor, rows: Tensor) -> Look:
    """What is counted here is what is not as it was asked for."""
    wrong = ~world.right(images, rows)
    at = wrong.to(images.device)
    return Look(wrong, images[at][:SHOWN].cpu(), images[~at][:SHOWN].cpu(), None)


def nearest(scene: Scene) -> list[int]:
    """The kept conditions whose vectors, of the model before, are nearest to the concept's (cosine)."""
    network, world = scene.before.network, scene.world
    kept = world.judged_kept

    def direction(rows: tuple[int, ...]) -> Tensor:
        index = torch.tensor(rows, device=network.device)
        if isinstance(network, TextDenoiser):
            vectors = network.table.embeds[index].float().mean(1)
        else:
            vectors = network.own_vectors(index)
        return torch.nn.functional.normalize(vectors, dim=1)

    if not kept:
        return []
    alike = (direction(kept) @ direction(world.forget).T).amax(1)
    return [kept[i] for i in alike.topk(min(NEIGHBOURS, len(kept))).indices.tolist()]
