"""What a probe is given: the world, the model before, a budget, images of the concept to fit to, and draws of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.audit.budget import Budget
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import World
from pecker_fast.forgetting import turns

SHOWN = 8  # images kept of a probe, to be looked at


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
    """One audit. before: the model that knew, which draws what probes fit to. poll: called between steps; may raise."""

    world: World
    before: Subject
    budget: Budget
    seed: int
    prompts: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (how the concept is said, rows of the table)
    named: tuple[int, ...] = ()  # all rows that name the concept, and what stands in their place
    covers: tuple[int, ...] = ()
    poll: Callable[[], object] = lambda: None

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
        self,
        subject: Subject,
        codes: Callable[[Tensor], Tensor] | None = None,
        rows: Tensor | None = None,
        what: str = "judged",
    ) -> tuple[Tensor, Tensor]:
        """(bool [N] whether the concept is seen, images [N, C, H, W]) of fresh noise. codes: conditions to draw under, of the
        rows of the concept that are looked for; None = those rows themselves."""
        rows = self.dealt(self.world.judged, self.budget.samples, "judged") if rows is None else rows
        images = subject.images(self.noise(what, len(rows)), rows if codes is None else codes(rows))
        return self.world.seen(images, rows), images


def share(seen: Tensor) -> float:
    return seen.double().mean().item()


def found_of(
    shares: dict[str, Tensor], images: dict[str, Tensor], world: World, rows: Tensor, **more: object
) -> Finding:
    """The finding of variants, each with what was seen (bool [N]) in its images of the concept's rows [N]: the worst one counts."""
    means = {name: share(seen) for name, seen in shares.items()}
    worst = max(means, key=lambda name: means[name])
    seen = shares[worst]
    shown = torch.cat([images[worst][seen], images[worst][~seen]])[:SHOWN]
    distance = world.distance(images[worst][seen], rows.cpu()[seen.cpu()]) if bool(seen.any()) else None
    return Finding(
        means[worst],
        len(seen),
        worst,
        means,
        distance=distance,
        images=shown.float().cpu(),
        **more,  # type: ignore[arg-type]
    )
