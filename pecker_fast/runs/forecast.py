"""What a recipe will take, told before anything is loaded: configs alone are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pecker_fast import files
from pecker_fast.account.memory import Prediction, enough, predict
from pecker_fast.conditions import PromptPlan
from pecker_fast.errors import ModelError
from pecker_fast.loading import check_source, config_folder, plan_of
from pecker_fast.machine import hardware
from pecker_fast.networks import architectures
from pecker_fast.recipe import Recipe

HUB = {  # hub models whose sizes are known without asking
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
FLOAT_BYTES = 4


def forecast(recipe: Recipe) -> Prediction | None:
    """Peak memory of a run by part; None for a hub model whose sizes are not known before it is fetched.

    Raises ModelError for a model whose configs cannot be read or built.
    """
    found = configs_of(recipe)
    if found is None:
        return None
    unet, vae, folder = found
    tokens, rows = architectures.TOKENS, 0
    if recipe.uses_prompts:
        tokens = _tokens(folder)
        rows = _prompts(*plan_of(recipe, folder))
    width = unet.get("cross_attention_dim") or 0
    width = max(width) if isinstance(width, list | tuple) else width
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return predict(
        recipe, unet, vae_config=vae, table_bytes=FLOAT_BYTES * rows * tokens * width, device=device, tokens=tokens
    )


def configs_of(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any] | None, Path | None] | None:
    """(UNet's config, VAE's, folder they lie in) of the recipe's model; None for a hub model that is not known."""
    if files.is_hub_name(recipe.model):
        known = HUB.get(recipe.model)
        if known is None:
            return None
        vae = "sdxl_vae" if known == "sdxl" else "sd15_vae"
        return architectures.architecture(f"{known}_unet"), architectures.architecture(vae), None
    source = files.resolve_model(recipe.model)
    check_source(recipe, source)
    folder = config_folder(recipe, source)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    config = files.read_json(unet / files.CONFIG_NAME, error=ModelError)
    vae_file = folder / "vae" / files.CONFIG_NAME
    return config, files.read_json(vae_file, error=ModelError) if vae_file.is_file() else None, folder


def _tokens(folder: Path | None) -> int:
    path = folder / "text_encoder" / files.CONFIG_NAME if folder is not None else None
    if path is None or not path.is_file():
        return architectures.TOKENS
    return int(files.read_json(path, error=ModelError).get("max_position_embeddings", architectures.TOKENS))


def _prompts(*plans: PromptPlan) -> int:
    return len({prompt for plan in plans for group in (plan.forget, plan.cover, plan.retain) for prompt in group}) + 1


def available_bytes() -> int:
    """Memory that a run can have: of the first GPU, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return hardware.memory_bytes()


def check_memory(recipe: Recipe) -> Prediction | None:
    """`forecast`; raises RecipeError, with figures and remedies, where it will not fit."""
    prediction = forecast(recipe)
    available = available_bytes()
    if prediction is not None and available:
        enough(prediction, available)
    return prediction
