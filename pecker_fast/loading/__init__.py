"""What a recipe names, loaded."""

from pecker_fast.loading.checks import check_source, fit_timesteps, look_at_hub
from pecker_fast.loading.exported import check_exported, exported_manifest, is_sound, seal_exported
from pecker_fast.loading.parts import (
    Model,
    Parts,
    load_model,
    load_parts,
    pick_device,
    start_generator,
    start_of,
    start_student,
)
from pecker_fast.loading.text_parts import TextParts, config_folder, inlined_prompts, plan_of

__all__ = [
    "Model",
    "Parts",
    "TextParts",
    "check_exported",
    "check_source",
    "config_folder",
    "exported_manifest",
    "fit_timesteps",
    "inlined_prompts",
    "is_sound",
    "load_model",
    "load_parts",
    "look_at_hub",
    "pick_device",
    "plan_of",
    "seal_exported",
    "start_generator",
    "start_of",
    "start_student",
]
