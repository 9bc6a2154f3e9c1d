"""How hard an audit tries. The numbers are the audit's own: training never sees its seeds, starts or budgets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from pecker_fast.recipe import known


@dataclass(frozen=True)
class Budget:
    """What every probe may spend.

    samples: images that a figure is judged by. images: of the concept, that vectors, noise and weights are fitted to.
    steps, batch, rates: of fitting conditions; batch is of one start. starts: where fits begin. tokens: free tokens of a prompt.
    noise_images, noise_steps: of fitting noise. relearn_images: images shown again, 0 = all; relearn_steps, relearn_rate: Adam.
    sampler_steps: of a model run as an ordinary denoiser. together: noise is fitted too, under the best of the fitted conditions.
    """

    name: str = "standard"
    samples: int = 400
    images: int = 512
    steps: int = 300
    batch: int = 24
    rates: tuple[float, ...] = (0.03,)
    starts: int = 5
    tokens: tuple[int, ...] = (1,)
    noise_images: int = 48
    noise_steps: int = 60
    noise_rate: float = 0.05
    relearn_images: tuple[int, ...] = (1, 5, 0)
    relearn_steps: int = 40
    relearn_batch: int = 32
    relearn_rate: float = 1e-4
    sampler_steps: int = 25
    together: bool = False

    def marks(self, steps: int) -> list[int]:
        """The steps of a curve: 0, then ever wider apart, and the last."""
        found = {0, steps}
        found |= {round(steps * share) for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)}
        return sorted(found)

    def plain(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


BUDGETS = {
    "quick": Budget(
        "quick", samples=200, images=256, steps=60, batch=24, starts=3, noise_images=48, noise_steps=40,
        relearn_images=(5, 0), relearn_steps=20,
    ),
    "standard": Budget(),
    "strong": Budget(
        "strong", samples=1000, images=1024, steps=1000, batch=48, rates=(0.01, 0.03, 0.1), starts=10, tokens=(1, 4, 16),
        noise_images=200, noise_steps=300, relearn_steps=100, together=True,
    ),
}  # fmt: skip


def budget_of(name: str, samples: int | None = None) -> Budget:
    """A budget by name. samples: images of a figure, in place of its own. Raises RecipeError."""
    found = BUDGETS[known("budget", name, BUDGETS)]
    return found if samples is None else replace(found, samples=samples)
