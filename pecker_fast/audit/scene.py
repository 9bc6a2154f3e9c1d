"""What a probe is given: the world, the model before, a budget, images of the concept to fit to, and draws of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.audit.budget import Budget
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import SHOWN, Look, World
from pecker_fast.forgetting import turns

NUMBERS = 1 << 20  # of samples that are drawn, decoded and judged at a time: 64 latents of 4×64×64


@dataclass(frozen=True)
class Pool:
    """Images of the concept, as the model before draws them. x: samples of its network, [M, C, H, W]; z: the noise they were
    drawn from; rows: the condition of each, int64 [M]."""

    x: Tensor
    z: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Finding:
    """What one probe brought back from one subject.

    recovery: share of `samples` images, of the variant that brought back most, in which every judge sees the concept; None
    where the probe does not apply (`why`). variants: the share of each. curves: variant -> [[step, share], …].
    to_half: steps until half of the samples show it, None = never. distance: of what came back to real images, see `World`.
    images: of that variant, [n, C, H, W] in [-1, 1].
    """

    recovery: float | None
    samples: int = 0
    worst: str = ""
    variants: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    to_half: int | None = None
    distance: float | None = None
    why: str = ""
    images: Tensor | None = None


@dataclass
class Scene:
    """One audit. before: the model that knew, which draws what probes fit to."""

    world: World
    before: Subject
    budget: Budget
    seed: int
    prompts: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (how the concept is said, rows of the table)
    named: tuple[int, ...] = ()  # all rows that name the concept, and what stands in their place
    covers: tuple[int, ...] = ()

    def generator(self, what: str, step: int = 0) -> torch.Generator:
        """Randomness of the audit alone: no stream of training begins with its name."""
        return draws.generator(self.seed, f"audit-{what}", step)

    def noise(self, what: str, n: int, step: int = 0) -> Tensor:
        """z ~ N(0, I), [n, C, H, W], equal for all subjects."""
        shape = (n, *self.before.network.sample_shape)
        return torch.randn(shape, generator=self.generator(what, step)).to(self.before.network.device)

    def dealt(self, rows: Sequence[int], n: int, what: str) -> Tensor:
        """n of the rows in turn, in an order of their own, int64 [n]."""
        order = torch.randperm(len(rows), generator=self.generator(f"order-{what}"))
        return torch.tensor(list(rows))[order][turns(len(rows), n)].to(self.before.network.device)

    @cached_property
    def pool(self) -> Pool:
        n = self.budget.images
        z, rows = self.noise("pool", n), self.dealt(self.world.forget, n, "pool")
        return Pool(self.before.samples(z, rows), z, rows)

    def judged(
        self, subject: Subject, codes: Callable[[Tensor], Tensor] | None = None, rows: Tensor | None = None
    ) -> Look:
        """What is seen in samples of fresh noise, equal for all. codes: conditions to draw under, of the rows of the concept that
        are looked for; None = those rows themselves."""
        rows = self.dealt(self.world.judged, self.budget.samples, "judged") if rows is None else rows
        asked = rows if codes is None else codes(rows)
        z = self.noise("judged", len(rows))
        return self.looked(subject, rows, lambda part: subject.samples(z[part], asked[part]))

    def looked(
        self,
        subject: Subject,
        rows: Tensor,
        drawn: Callable[[slice], Tensor],
        look: Callable[[Tensor, Tensor], Look] | None = None,
    ) -> Look:
        """What is seen in samples, a block at a time, so that memory does not grow with their number. rows: of the concept, [N];
        drawn: the network's samples of some of them. look: who says what is seen; None = the world's judges, of the concept."""
        look = look or self.world.look
        size = max(1, NUMBERS // math.prod(self.before.network.sample_shape))
        parts = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            images = subject.network.to_images(drawn(part))
            parts.append(look(images, rows[part]))
        return join(parts)


def always(row: int) -> Callable[[Tensor], Tensor]:
    """Conditions to draw under, whatever is looked for: this one."""
    return lambda rows: torch.full_like(rows, row)


def join(parts: Sequence[Look]) -> Look:
    """Several blocks as one."""
    known = [(part.distance, int(part.seen.sum())) for part in parts if part.distance is not None]
    count = sum(n for _, n in known)
    distance = sum(value * n for value, n in known) / count if count else None
    shown, others = (torch.cat([getattr(part, kind) for part in parts])[:SHOWN] for kind in ("shown", "others"))
    return Look(torch.cat([part.seen for part in parts]), shown, others, distance)


def found_of(looks: Mapping[str, Look], **more: Any) -> Finding:
    """The finding of variants: the worst one counts."""
    means = {name: look.share for name, look in looks.items()}
    worst = max(means, key=lambda name: means[name])
    look = looks[worst]
    images = torch.cat([look.shown, look.others])[:SHOWN]
    return Finding(
        means[worst], len(look.seen), worst, means, distance=look.distance, images=images.float().cpu(), **more
    )
