"""Whether a contrast (`mask.contrast`) has anything to divide by.

With `mask.score=forget_loss` the retain gradient is that of (f_φ − f_ψ) · (…) with one condition on both sides. While ψ still is φ,
both terms of it are the same number with opposite signs: what is left is rounding, and no weight is told from another by it.
"""

import torch

from pecker_fast.errors import RecipeError
from pecker_fast.networks import Denoiser, same_function
from pecker_fast.recipe import Recipe

# share of its own terms below which a retain gradient is rounding; signal is .6 to .9, rounding 0 to 3e-8 (docs/design/0008)
ROUNDING = {"fp32": 1e-4, "bf16": 8 * torch.finfo(torch.bfloat16).eps}


def contrasts_losses(recipe: Recipe) -> bool:
    """Whether the mask is a contrast of forgetting losses, whose retain side needs a ψ that has left φ."""
    mask = recipe.mask
    return recipe.uses_mask and mask.source == "saliency" and mask.contrast and mask.score == "forget_loss"


def cancels_at_start(recipe: Recipe, teacher: Denoiser | None, score: Denoiser | None) -> bool:
    """Whether ψ starts the forget stage as φ, to the bit, and is asked with the same guidance. teacher, score: None for those
    that are not loaded: what the recipe says of them."""
    guidance = recipe.guidance
    if not contrasts_losses(recipe) or recipe.distill_steps or guidance.teacher != guidance.score:
        return False
    if teacher is None or score is None:
        return recipe.generator is None or recipe.score == "lora"
    return same_function(teacher, score)


def check_start(recipe: Recipe, teacher: Denoiser | None = None, score: Denoiser | None = None) -> None:
    """Raise RecipeError where it is known before anything runs that the contrast would be noise; see `cancels_at_start`."""
    if cancels_at_start(recipe, teacher, score):
        raise no_signal("ψ starts as the teacher φ itself")


def check_left(recipe: Recipe, left: float) -> None:
    """Raise RecipeError where what is left of the retain gradient's terms (losses.share_left) is rounding."""
    if not left > ROUNDING[recipe.precision]:
        raise no_signal(f"{left:.1e} of its terms is left")


def no_signal(why: str) -> RecipeError:
    return RecipeError(
        f"mask.contrast: the retain gradient of mask.score=forget_loss is rounding noise, the terms of φ and ψ cancel ({why}); "
        "use mask.score=mse, or mask.contrast=false, or start two-stage: distill_steps, or a generator with its score/"
    )
