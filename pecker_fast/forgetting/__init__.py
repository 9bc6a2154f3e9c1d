"""The papers: losses, samplers, saliency, the methods and their update rules."""

from pecker_fast.forgetting.adversary import (
    Adversary,
    Attack,
    attack_of,
    coded,
    draw_pool,
    first_starts,
    half_way,
    pieces_of,
    restarting,
    start_of,
)
from pecker_fast.forgetting.batch import Batch, concatenate
from pecker_fast.forgetting.contrast import check_start
from pecker_fast.forgetting.excluded import check_exclude, excluded, share_of_rest
from pecker_fast.forgetting.inversion import (
    Vectors,
    denoising_error,
    drawing_error,
    error_gradient,
    fit_step,
    near,
    turns,
)
from pecker_fast.forgetting.losses import generate, generator_loss, noise_loss
from pecker_fast.forgetting.methods import UpdateRule, get_method
from pecker_fast.forgetting.saliency import CONTRAST_FLOOR, ForgetImages, SaliencyPass, batches_of
from pecker_fast.forgetting.samplers import (
    batch_of,
    ddim_sample,
    ddim_scheduler,
    denoised,
    grid_labels,
    one_step_sample,
    save_grid,
)
from pecker_fast.forgetting.updates import Dense, Gradients, adam

__all__ = [
    "CONTRAST_FLOOR",
    "Adversary",
    "Attack",
    "Batch",
    "Dense",
    "ForgetImages",
    "Gradients",
    "SaliencyPass",
    "UpdateRule",
    "Vectors",
    "adam",
    "attack_of",
    "batch_of",
    "batches_of",
    "check_exclude",
    "check_start",
    "coded",
    "concatenate",
    "ddim_sample",
    "ddim_scheduler",
    "denoised",
    "denoising_error",
    "draw_pool",
    "drawing_error",
    "error_gradient",
    "excluded",
    "first_starts",
    "fit_step",
    "generate",
    "generator_loss",
    "get_method",
    "grid_labels",
    "half_way",
    "near",
    "noise_loss",
    "one_step_sample",
    "pieces_of",
    "restarting",
    "save_grid",
    "share_of_rest",
    "start_of",
    "turns",
]
