"""Denoisers and what they are made of: schedules, text models, adapters, single files, architectures."""

from pecker_fast.networks.aligned import aligned_tokens
from pecker_fast.networks.denoiser import Denoiser, check_class_folder, load_denoiser, load_unet, load_weights
from pecker_fast.networks.lora import AdaptedUNet, adaptable, pair_x0, same_function, with_adapters
from pecker_fast.networks.marks import (
    MANY_STEPS,
    MARKS,
    ONE_STEP,
    check_said,
    many_steps_marks,
    one_step_marks,
    one_step_start,
)
from pecker_fast.networks.norms import fuse_norms
from pecker_fast.networks.numbers import are_weights, check_numbers
from pecker_fast.networks.part_files import copy_part, copy_small, save_part
from pecker_fast.networks.prompt_window import PromptWindow
from pecker_fast.networks.schedule import Schedule, load_schedule
from pecker_fast.networks.text_denoiser import TextDenoiser, TextTable
from pecker_fast.networks.text_model import is_text_model

__all__ = [
    "MANY_STEPS",
    "MARKS",
    "ONE_STEP",
    "AdaptedUNet",
    "Denoiser",
    "PromptWindow",
    "Schedule",
    "TextDenoiser",
    "TextTable",
    "adaptable",
    "aligned_tokens",
    "are_weights",
    "check_class_folder",
    "check_numbers",
    "check_said",
    "copy_part",
    "copy_small",
    "fuse_norms",
    "is_text_model",
    "load_denoiser",
    "load_schedule",
    "load_unet",
    "load_weights",
    "many_steps_marks",
    "one_step_marks",
    "one_step_start",
    "pair_x0",
    "same_function",
    "save_part",
    "with_adapters",
]
