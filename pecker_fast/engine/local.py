"""One process: a score step and a generator step, branches batched through the networks they share."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from pecker_kernels import all_finite
from torch import Tensor, nn

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.config import Recipe
from pecker_fast.engine.state import TrainState
from pecker_fast.errors import NonFiniteError
from pecker_fast.losses import generate, generator_loss, noise_loss
from pecker_fast.methods.updates import Gradients
from pecker_fast.profile import part


@dataclass(frozen=True)
class Batch:
    """One branch's draws, n samples."""

    z: Tensor  # [n, C, H, W]
    e: Tensor  # [n, C, H, W]
    t: Tensor  # [n]
    c_g: Tensor  # [n], condition of generator and score network
    c_p: Tensor  # [n], condition of the teacher


def concatenate(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("z", "e", "t", "c_g", "c_p")))


class LocalEngine:
    """Runs the two steps of an iteration on one device. Branch weights of zero skip the branch."""

    def __init__(self, recipe: Recipe, conditions: Conditions, device: torch.device) -> None:
        self.recipe = recipe
        self.conditions = conditions
        self.device = device

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16")

    @part("draws")
    def draw(self, state: TrainState, role: str, branch: str) -> Batch:
        """Fresh draws for one branch of one step: a function of seed, stage, step, role ("score", "generator") and branch."""
        recipe, n, device = self.recipe, self.recipe.batch_size, self.device
        rng = draws.generator(recipe.seed, f"{state.stage}-{role}-{branch}", state.step, device)
        z = torch.randn(n, *state.generator.sample_shape, generator=rng, device=device)
        e = torch.randn(z.shape, generator=rng, device=device)
        t = torch.randint(recipe.timesteps.min, recipe.timesteps.max, (n,), generator=rng, device=device)
        c_g, c_p = self.conditions.draw(branch, n, rng)
        if role == "score" and recipe.guidance.text_dropout > 0:
            drop = torch.rand(n, generator=rng, device=device) < recipe.guidance.text_dropout
            null_class = torch.full_like(c_g, state.score.null_class or 0)
            c_p = torch.where(drop, null_class, c_g)  # what ψ is told; θ draws under c_g all the same
        elif role == "score":
            c_p = c_g
        return Batch(z, e, t, c_g, c_p)

    def branch_weights(self, stage: str, role: str) -> dict[str, float]:
        """Branch -> coefficient; plain distillation has one branch over all classes."""
        w = self.recipe.weights
        retain, forget = (w.score_retain, w.score_forget) if role == "score" else (w.retain, w.forget)
        weights = {"all": retain} if stage == "distill" else {"retain": retain, "forget": forget}
        return {branch: weight for branch, weight in weights.items() if weight != 0}

    def score_step(self, state: TrainState) -> dict[str, Tensor]:
        """ψ learns θ's distribution: L_ψ = s_r mean_n ℓ(retain) + s_f mean_n ℓ(forget), θ under no_grad."""
        weights = self.branch_weights(state.stage, "score")
        batch = concatenate([self.draw(state, "score", branch) for branch in weights])
        with self.autocast():
            with torch.no_grad(), part("score_samples"):
                x_g = generate(state.generator, batch.z, batch.c_g, self.recipe.timesteps.init)
            x_t = state.teacher.schedule.add_noise(x_g, batch.e, batch.t)
            guidance = self.recipe.guidance.score_train

            def eps(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
                return state.score.eps(x, t, c, guidance)

            with part("score_forward"):
                per_sample = noise_loss(eps, x_t, batch.e, batch.t, batch.c_p)
        loss = weighted_mean(per_sample, weights)
        state.score_optimizer.zero_grad()
        with part("score_backward"):
            loss.backward()
        parameters = [p for _, p in state.score.named_parameters()]
        self._check_finite(state, "score network", [p.grad for p in parameters], state.score.named_parameters())
        with part("score_optimizer"):
            state.score_optimizer.step()
        state.score_optimizer.zero_grad()
        state.images += per_sample.shape[0]
        return {"score_loss": loss.detach()}

    def generator_step(self, state: TrainState) -> dict[str, Tensor]:
        """θ: the phases of the update rule in order, each at the weights the one before left behind."""
        weights = self.branch_weights(state.stage, "generator")
        losses: dict[str, Tensor] = {}
        with state.score.frozen():  # the gradient flows through ψ to x_t
            phases = (tuple(weights),) if state.stage == "distill" else state.updates.phases
            for phase in phases:
                branches = {branch: weights[branch] for branch in phase if branch in weights}
                if branches:
                    gradients, values = self.branch_gradients(state, branches, separate=state.updates.separate)
                    with part("generator_optimizer"):
                        state.updates.apply(phase, gradients)
                    losses |= values
        for p in state.updates.parameters:
            p.grad = None
        return losses

    def branch_gradients(
        self, state: TrainState, weights: dict[str, float], separate: bool
    ) -> tuple[dict[str, Gradients], dict[str, Tensor]]:
        """(gradients of θ, losses by branch). One pass of φ and ψ serves all branches; θ is differentiated per branch
        if `separate`.

        The chain rule is cut at x_g: dL/dx_g comes from the shared pass, then each branch goes back through θ alone.
        """
        recipe, named = self.recipe, state.generator.named_parameters()
        batches = {branch: self.draw(state, "generator", branch) for branch in weights}
        groups = [[branch] for branch in batches] if separate else [list(batches)]
        with self.autocast():
            x_groups = []
            for group in groups:
                joined = concatenate([batches[branch] for branch in group])
                with part("generator_forward"):
                    x_groups.append(generate(state.generator, joined.z, joined.c_g, recipe.timesteps.init))
            x_g = torch.cat([x.detach() for x in x_groups]).requires_grad_(True)
            batch = concatenate([batches[branch] for group in groups for branch in group])
            with part("guide_forward"):
                per_sample = generator_loss(
                    state.teacher, state.score, x_g, batch.e, batch.t, batch.c_g, batch.c_p, alpha=recipe.alpha,
                    guidance_teacher=recipe.guidance.teacher, guidance_score=recipe.guidance.score,
                    detach_score=recipe.detach_score,
                )  # fmt: skip
        loss = weighted_mean(per_sample, weights)
        with part("guide_backward"):
            (dx_g,) = torch.autograd.grad(loss, x_g)
        parameters = [p for _, p in named]
        gradients: dict[str, Gradients] = {}
        for group, x, dx in zip(groups, x_groups, dx_g.split([x.shape[0] for x in x_groups])):
            with part("generator_backward_" + "_".join(group)):
                grads = torch.autograd.grad(x, parameters, dx.to(x.dtype), allow_unused=True)
            self._check_finite(state, "generator", grads, named)
            gradients[group[0] if separate else "sum"] = grads
        if separate:  # a branch of weight zero has no gradient at all
            gradients = {branch: gradients.get(branch, [None] * len(parameters)) for branch in ("retain", "forget")}
        state.images += x_g.shape[0]
        means = per_sample.detach().view(len(weights), -1).mean(1)
        return gradients, {("retain" if b == "all" else b) + "_loss": mean for b, mean in zip(weights, means)}

    @part("finite_check")
    def _check_finite(
        self, state: TrainState, what: str, grads: Gradients, named: list[tuple[str, nn.Parameter]]
    ) -> None:
        """Raise before anything non-finite reaches a weight; the weights stay those of the last good step."""
        if all_finite([g for g in grads if g is not None]):
            return
        bad = next(name for (name, _), g in zip(named, grads) if g is not None and not bool(torch.isfinite(g).all()))
        raise NonFiniteError(
            f"{state.stage} step {state.step}: the gradient of {what} tensor {bad} is not finite; it was not "
            "applied and checkpoints are as they were; start over (resume=never) with a lower lr or optimizer.clip_value"
        )


def weighted_mean(per_sample: Tensor, weights: dict[str, float]) -> Tensor:
    """Σ_branch weight · mean over the branch's samples; per_sample [branches · n] in the order of `weights`."""
    coefficients = torch.tensor(list(weights.values()), device=per_sample.device)
    return (per_sample.float().view(len(weights), -1).mean(1) * coefficients).sum()
