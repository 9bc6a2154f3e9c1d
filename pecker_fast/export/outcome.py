"""What a result is to whoever loads it: a one-step generator with a schedule of its own, or a model as its base was."""

from __future__ import annotations

import json
from typing import Any

from pecker_fast import files
from pecker_fast.loading import Model
from pecker_fast.networks import MANY_STEPS, ONE_STEP, Denoiser, many_steps_marks, one_step_marks
from pecker_fast.recipe import Recipe

SCHEDULER = "scheduler_config.json"


def marks_of(recipe: Recipe, generator: Denoiser) -> dict[str, str]:
    """What a weights file says of itself."""
    if recipe.one_step:
        return one_step_marks(generator.schedule, recipe.timesteps.init)
    return many_steps_marks(generator.schedule)


def kind_of(recipe: Recipe) -> dict[str, Any]:
    """Its first lines in model.json."""
    return {"kind": ONE_STEP, "t_init": recipe.timesteps.init} if recipe.one_step else {"kind": MANY_STEPS}


def scheduler_of(recipe: Recipe, generator: Denoiser, model: Model) -> dict[str, Any]:
    """scheduler_config.json: of one step, or the base's own."""
    if not recipe.one_step:
        return base_scheduler(model)
    # Stable Diffusion's pipelines want to see the offset; trailing spacing ignores it
    config = scheduler_config(generator, recipe.timesteps.init)
    return config | ({} if model.text is None else {"steps_offset": 1})


def index_of(recipe: Recipe, model: Model) -> dict[str, Any]:
    """model_index.json."""
    base = files.read_index(model.configs)
    if recipe.one_step:
        return one_step_index(base if model.text is not None else None)
    if base:
        return files.without_parts_beside(base)
    scheduler = base_scheduler(model).get("_class_name", "DDPMScheduler")
    return {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler]}


def one_step_index(base: dict[str, Any] | None) -> dict[str, Any]:
    """model_index.json of a one-step result; base: that of the model it came from, None for a class model."""
    scheduler = ["diffusers", "EulerDiscreteScheduler"]
    if base is None:
        return {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": scheduler}
    return files.without_parts_beside(base) | {"scheduler": scheduler}


def scheduler_config(generator: Denoiser, t_init: int) -> dict[str, Any]:
    """Config of the EulerDiscreteScheduler whose single step is the one-step generator.

    The schedule ends at t_init, so that a plain call with one step takes it there: trailing spacing begins at the end.
    """
    from diffusers import EulerDiscreteScheduler

    schedule = generator.schedule
    whole: Any = EulerDiscreteScheduler(
        **schedule.config, prediction_type=schedule.prediction_type, timestep_spacing="trailing"
    )
    config = json.loads(whole.to_json_string())
    betas = whole.betas[: t_init + 1].tolist()  # rescaled already, where that was asked for
    return config | {"num_train_timesteps": len(betas), "trained_betas": betas, "rescale_betas_zero_snr": False}


def base_scheduler(model: Model) -> dict[str, Any]:
    """The scheduler_config.json that the model came with."""
    inside = model.configs / "scheduler"
    return files.read_object((inside if inside.is_dir() else model.configs) / SCHEDULER)
