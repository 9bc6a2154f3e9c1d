"""Denoisers and what they are made of: schedules, text models, adapters, single files, architectures."""

from pecker_fast.networks.denoiser import Denoiser, check_class_folder, load_denoiser, load_unet, load_weights
from pecker_fast.networks.lora import lora_score, pair_x0, same_function
from pecker_fast.networks.marks import MARKS, ONE_STEP, check_said, one_step_marks, one_step_start
from pecker_fast.networks.numbers import are_weights, check_numbers
from pecker_fast.networks.part_files import copy_part, copy_small, save_part
from pecker_fast.networks.prompt_window import PromptWindow
from pecker_fast.networks.schedule import Schedule, load_schedule
from pecker_fast.networks.text_denoiser import TextDenoiser, TextTable
from pecker_fast.networks.text_model import is_text_model

__all__ = [
    "MARKS",
    "ONE_STEP",
    "Denoiser",
    "PromptWindow",
    "Schedule",
    "TextDenoiser",
    "TextTable",
    "are_weights",
    "check_class_folder",
    "check_numbers",
    "check_said",
    "copy_part",
    "copy_small",
    "is_text_model",
    "load_denoiser",
    "load_schedule",
    "load_unet",
    "load_weights",
    "lora_score",
    "one_step_marks",
    "one_step_start",
    "pair_x0",
    "same_function",
    "save_part",
]
