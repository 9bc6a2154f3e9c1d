"""Neighbours: what the kept conditions nearest to the concept have lost."""

from __future__ import annotations

import torch
from torch import Tensor

from pecker_fast.audit.scene import SHOWN, Finding, Scene, share
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import NEIGHBOURS
from pecker_fast.networks import TextDenoiser


def neighbours(scene: Scene, subject: Subject) -> Finding:
    """Share of the samples of the nearest kept conditions that are not what was asked for; the worst one counts."""
    world, n = scene.world, scene.budget.samples
    shares, images = {}, {}
    for row in nearest(scene):
        scene.poll()
        rows = torch.full((n,), row, device=scene.before.network.device)
        images[world.name(row)] = subject.images(scene.noise("neighbours", n, row), rows)
        shares[world.name(row)] = 1 - share(world.right(images[world.name(row)], rows))
    if not shares:
        return Finding(None, why="nothing is kept")
    worst = max(shares, key=lambda name: shares[name])
    return Finding(shares[worst], n, worst, shares, images=images[worst][:SHOWN].float().cpu())


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
