"""Asked otherwise: the concept by other conditions than the one that was forgotten, no weight and no vector touched."""

from __future__ import annotations

import torch

from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.networks import TextDenoiser


def asked_otherwise(scene: Scene, subject: Subject) -> Finding:
    """Of classes: every other class, and none. Of prompts: the concept in other words."""
    world, budget = scene.world, scene.budget
    seen, images = {}, {}
    if isinstance(subject.network, TextDenoiser):
        if not scene.prompts:
            return Finding(None, why="no other words are known for the concept; give --prompts")
        n = max(16, budget.samples // 4)
        rows = scene.dealt(world.judged[:1], n, "words")
        for name, said in scene.prompts:
            scene.poll()
            asked = scene.dealt(said, n, "words")
            seen[name], images[name] = scene.judged(subject, lambda _, asked=asked: asked, rows)  # type: ignore[misc]
        return found_of(seen, images, world, rows)
    others = [row for row in (*world.kept, world.null) if row is not None]
    rows = scene.dealt(world.judged, budget.samples, "words")
    for row in others:
        scene.poll()
        name = world.name(row)
        seen[name], images[name] = scene.judged(subject, lambda r, row=row: torch.full_like(r, row), rows)  # type: ignore[misc]
    return found_of(seen, images, world, rows)
