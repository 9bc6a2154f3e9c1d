"""The papers: losses, samplers, saliency, the methods and their update rules."""

from pecker_fast.forgetting.losses import generate, generator_loss, noise_loss
from pecker_fast.forgetting.methods import UpdateRule, get_method
from pecker_fast.forgetting.saliency import ForgetImages, batch_loss, batches_of, make_mask, mask_flops
from pecker_fast.forgetting.samplers import ddim_sample, grid_labels, one_step_sample, save_grid
from pecker_fast.forgetting.updates import Dense, Gradients, adam

__all__ = [
    "Dense",
    "ForgetImages",
    "Gradients",
    "UpdateRule",
    "adam",
    "batch_loss",
    "batches_of",
    "ddim_sample",
    "generate",
    "generator_loss",
    "get_method",
    "grid_labels",
    "make_mask",
    "mask_flops",
    "noise_loss",
    "one_step_sample",
    "save_grid",
]
