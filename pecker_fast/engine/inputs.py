"""What differs from one iteration to the next, made on the device before it starts: draws and the weight of the average."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.engine.state import TrainState
from pecker_fast.forgetting import Attack, Batch, Networks, Objective, coded, half_way
from pecker_fast.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Everything an iteration reads that the one before did not: nothing else reaches the device while it runs."""

    batches: dict[tuple[str, str], Batch]  # (role, branch) -> draws
    attacks: tuple[Attack, ...] = ()  # of the adversary's steps
    ema_weight: Tensor | None = None  # 0-dim, 1 − decay of this iteration; None where the host steps the average itself

    def tensors(self) -> list[Tensor]:
        found = [tensor for batch in self.batches.values() for tensor in batch.tensors()]
        found += [tensor for attack in self.attacks for tensor in attack.tensors()]
        return found if self.ema_weight is None else [*found, self.ema_weight]

    def copy_(self, other: "Inputs") -> None:
        """Take over the values of another iteration's inputs: a CUDA graph reads them where they lay when it was captured."""
        torch._foreach_copy_(self.tensors(), other.tensors())


def draw(
    recipe: Recipe, conditions: Conditions, state: TrainState, role: str, branch: str, device: torch.device,
    objective: Objective,
) -> Batch:  # fmt: skip
    """Fresh draws for one branch of one step: a function of seed, stage, step, role ("score", "generator") and branch."""
    n = recipe.batch_size
    rng = draws.generator(recipe.seed, f"{state.stage}-{role}-{branch}", state.step, device)
    z = torch.randn(n, *state.generator.sample_shape, generator=rng, device=device)
    e = torch.randn(z.shape, generator=rng, device=device)
    t = torch.randint(recipe.timesteps.min, recipe.timesteps.max, (n,), generator=rng, device=device)
    c_g, c_p = conditions.draw(branch, n, rng)
    t_g = torch.full_like(t, recipe.timesteps.init)
    batch = Batch(z, t_g, e, t, c_g, c_g, c_p)
    if not recipe.one_step:
        batch = objective.draw(recipe, batch, branch, Networks(state.teacher, None, state.generator), state.pool, rng)
        if branch == "forget" and state.adversary is not None:
            batch = coded(recipe, conditions, batch, state.generator, state.step)
        return batch
    if branch == "forget" and state.adversary is not None:
        batch = coded(recipe, conditions, batch, state.generator, state.step)
        batch = half_way(recipe, state.adversary, batch, state.generator, rng)
    if role == "score" and state.score is not None and recipe.guidance.text_dropout > 0:
        drop = torch.rand(n, generator=rng, device=device) < recipe.guidance.text_dropout
        null_class = torch.full_like(c_g, state.score.null_class or 0)
        batch = replace(batch, c_s=torch.where(drop, null_class, batch.c_s))  # θ draws under c_g all the same
    return batch
