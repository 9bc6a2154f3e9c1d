"""Asked otherwise: the concept by other conditions than the one that was forgotten, no weight and no vector touched."""

from __future__ import annotations

from pecker_fast.audit.scene import Finding, Scene, always, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.networks import TextDenoiser


def asked_otherwise(scene: Scene, subject: Subject) -> Finding:
    """Of classes: every other class, and none. Of prompts: the concept in other words."""
    world, budget, looks = scene.world, scene.budget, {}
    if isinstance(subject.network, TextDenoiser):
        if not scene.prompts:
            return Finding(None, why="no other words are known for the concept; give --prompts")
        n = max(16, budget.samples // 4)
        rows = scene.dealt(world.judged[:1], n, "words")
        for name, said in scene.prompts:
            asked = scene.dealt(said, n, "words")
            looks[name] = scene.judged(subject, lambda rows, asked=asked: asked, rows)  # type: ignore[misc]
        return found_of(looks)
    for row in (*world.kept, world.null):
        if row is not None:
            looks[world.name(row)] = scene.judged(subject, always(row))
    return found_of(looks)
