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
from pecker_fast.forgetting.anchor import Anchor, anchor_of
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
from pecker_fast.forgetting.methods import UpdateRule, check_method, get_method, register, unregister
from pecker_fast.forgetting.objective import DenoiserObjective, Edit, Networks, Objective, ScoreDistillation
from pecker_fast.forgetting.pool import OwnImages, Pool, make_pool
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
from pecker_fast.forgetting.sld import sld_sample
from pecker_fast.forgetting.updates import Dense, Gradients, adam

__all__ = [
    "CONTRAST_FLOOR",
    "Adversary",
    "Anchor",
    "Attack",
    "Batch",
    "DenoiserObjective",
    "Dense",
    "Edit",
    "ForgetImages",
    "Gradients",
    "Networks",
    "Objective",
    "OwnImages",
    "Pool",
    "SaliencyPass",
    "ScoreDistillation",
    "UpdateRule",
    "Vectors",
    "adam",
    "anchor_of",
    "attack_of",
    "batch_of",
    "batches_of",
    "check_exclude",
    "check_method",
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
    "make_pool",
    "near",
    "noise_loss",
    "one_step_sample",
    "pieces_of",
    "register",
    "restarting",
    "save_grid",
    "share_of_rest",
    "sld_sample",
    "start_of",
    "turns",
    "unregister",
]
