"""Which weights carry the concept: gradient scores over the forget set, and the mask cut from them (PECKER Eq. 8-10)."""

from collections.abc import Callable
from typing import Any

import torch
from pecker_kernels import SaliencyMask, SaliencyScores
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.losses import generate, generator_loss, noise_loss
from pecker_fast.forgetting.samplers import ddim
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe

ForgetImages = Callable[[Tensor, int], Tensor]  # (labels [N], batch index) -> images [N, C, H, W] in [-1, 1]


def make_mask(
    recipe: Recipe,
    teacher: Denoiser,
    score: Denoiser,
    generator: Denoiser,
    conditions: Conditions,
    step: int = 0,
    forget_images: ForgetImages | None = None,
    poll: Callable[[], object] = lambda: None,
) -> SaliencyMask | None:
    """The recipe's mask over the generator's weights at this step; None for `mask.source=none`.

    `step` numbers the refresh, so that each one draws fresh samples. forget_images serves `mask.data=PATH`; poll is
    called before every batch and may raise.
    """
    options = recipe.mask
    if options.source == "none":
        return None
    shape: dict[str, Any] = {"structure": options.structure, "tile": tuple(options.tile), "scope": options.scope}
    if options.source == "random":
        seed = draws.generator(recipe.seed, "random-mask", step).initial_seed()
        return SaliencyMask.random(generator.named_parameters(), density=options.density, seed=seed, **shape)
    scores = saliency_scores(
        recipe, teacher, score, generator, conditions, "forget", options.reduction, step, forget_images, poll
    )
    if options.contrast:
        retain = saliency_scores(recipe, teacher, score, generator, conditions, "retain", "square", step, None, poll)
        scores.contrast_(retain, floor=1e-3)
    if options.threshold is not None:
        return SaliencyMask.from_scores(scores, threshold=options.threshold, **shape)
    return SaliencyMask.from_scores(scores, density=options.density, **shape)


def mask_flops(recipe: Recipe, *parts: Any) -> float:
    """FLOPs of `make_mask` with these arguments: one batch is made again and counted, all cost the same.

    Counting every batch would take more time than the mask itself, where networks are small.
    """
    if not recipe.uses_mask or recipe.mask.source != "saliency":
        return 0.0
    one = recipe.model_copy(update={"mask": recipe.mask.model_copy(update={"samples": recipe.batch_size})})
    with FlopCounterMode(display=False) as counter:
        make_mask(one, *parts)
    return float(counter.get_total_flops() * batches_of(recipe))


def batches_of(recipe: Recipe) -> int:
    """Batches of the saliency pass."""
    return max(1, round(recipe.mask.samples / recipe.batch_size))


def saliency_scores(
    recipe: Recipe,
    teacher: Denoiser,
    score: Denoiser,
    generator: Denoiser,
    conditions: Conditions,
    branch: str,
    reduction: str,
    step: int = 0,
    forget_images: ForgetImages | None = None,
    poll: Callable[[], object] = lambda: None,
) -> SaliencyScores:
    """Scores of ∇_θ ℓ over `mask.samples` samples of the branch; θ is only differentiated, never written.

    ℓ is the noise-prediction error ε_θ on x_t (score: mse, Eq. 8) or the generator's own loss (score: forget_loss).
    """
    named = generator.named_parameters()
    scores = SaliencyScores(named, reduction=reduction)
    batches = batches_of(recipe)
    for index in range(batches):
        poll()
        for _, p in named:
            p.grad = None
        batch_loss(recipe, teacher, score, generator, conditions, branch, index, step, forget_images).backward()
        scores.accumulate(last=index == batches - 1)
    for _, p in named:
        p.grad = None
    return scores


def batch_loss(
    recipe: Recipe,
    teacher: Denoiser,
    score: Denoiser,
    generator: Denoiser,
    conditions: Conditions,
    branch: str,
    index: int,
    step: int = 0,
    forget_images: ForgetImages | None = None,
) -> Tensor:
    """ℓ over batch number `index` of the saliency pass; see `saliency_scores`."""
    rng = draws.generator(recipe.seed, f"saliency-{branch}-{step}", index, generator.device)
    n = recipe.batch_size
    c_g, c_p = conditions.draw(branch, n, rng)
    z = torch.randn(n, *generator.sample_shape, generator=rng, device=rng.device)
    e = torch.randn(z.shape, generator=rng, device=rng.device)
    t = _timesteps(recipe, teacher, n, rng)
    if recipe.mask.score == "forget_loss":
        x_g = generate(generator, z, c_g, recipe.timesteps.init)
        with score.frozen():  # as in the generator step: through ψ, not to its weights
            per_sample = generator_loss(
                teacher, score, x_g, e, t, c_g, c_p, alpha=recipe.alpha, detach_score=recipe.detach_score,
                guidance_teacher=recipe.guidance.teacher, guidance_score=recipe.guidance.score,
            )  # fmt: skip
    else:
        x_0 = _forget_set(recipe, teacher, generator, z, c_g, index, branch, step, forget_images)
        x_t = generator.schedule.add_noise(x_0, e, t)
        per_sample = noise_loss(generator.eps, x_t, e, t, c_g)
    return per_sample.mean()


def _timesteps(recipe: Recipe, teacher: Denoiser, n: int, rng: torch.Generator) -> Tensor:
    """[n] timesteps of the saliency loss; the generator's own loss is only defined on the training range."""
    if recipe.mask.timesteps == "init":
        return torch.full((n,), recipe.timesteps.init, device=rng.device)
    if recipe.mask.timesteps == "train" or recipe.mask.score == "forget_loss":
        low, high = recipe.timesteps.min, recipe.timesteps.max
    else:
        low, high = 0, teacher.schedule.num_timesteps
    return torch.randint(low, high, (n,), generator=rng, device=rng.device)


@torch.no_grad()
def _forget_set(
    recipe: Recipe,
    teacher: Denoiser,
    generator: Denoiser,
    z: Tensor,
    c: Tensor,
    index: int,
    branch: str,
    step: int,
    forget_images: ForgetImages | None,
) -> Tensor:
    """x_0 [N, C, H, W] of the noise-prediction score: samples of θ, of the teacher, or the user's own images."""
    if branch == "forget" and forget_images is not None:
        return forget_images(c, index).to(z.device)
    if recipe.mask.data == "teacher":
        seed = draws.generator(recipe.seed, f"saliency-teacher-{branch}-{step}", index).initial_seed()
        steps, guidance = recipe.evaluate.teacher_steps, recipe.guidance.teacher
        return torch.cat(list(ddim(teacher, c, steps, seed, guidance=guidance)))
    if recipe.mask.data == "pseudo" or branch == "retain":
        return generate(generator, z, c, recipe.timesteps.init)
    raise RecipeError(f"mask.data: {recipe.mask.data!r} needs images to be loaded first")
