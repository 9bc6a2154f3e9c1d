"""What a recipe will take, told before anything is loaded: configs alone are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pecker_fast import files
from pecker_fast.account import measured_rate
from pecker_fast.account.memory import Prediction, enough, lighter_keys, predict
from pecker_fast.conditions import PromptPlan
from pecker_fast.errors import ModelError, PeckerError
from pecker_fast.loading import check_source, config_folder, plan_of
from pecker_fast.machine import Device, device_of
from pecker_fast.networks import architectures
from pecker_fast.recipe import Recipe, with_overrides

HUB = {  # hub models whose sizes are known without asking
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
FLOAT_BYTES = 4


def forecast(recipe: Recipe, device: Device | None = None) -> Prediction | None:
    """Peak memory of a run by part; None for a hub model whose sizes are not known before it is fetched.

    device: None = what runs here use. Raises ModelError for a model whose configs cannot be read or built.
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
    kind = (device or device_of()).kind
    table = FLOAT_BYTES * rows * tokens * width
    with files.guarded(folder or recipe.model, "its configs make no network that can be rehearsed"):
        return predict(recipe, unet, vae_config=vae, table_bytes=table, device=kind, tokens=tokens)


@files.guarded("model", "its configs cannot be read")
def configs_of(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any] | None, Path | None] | None:
    """(UNet's config, VAE's, folder they lie in) of the recipe's model; None for a hub model that is not known."""
    if files.is_hub_name(recipe.model):
        known = HUB.get(recipe.model)
        if known is None:
            return None
        vae = architectures.architecture("sdxl_vae" if known == "sdxl" else "sd15_vae")
        return _resized(architectures.architecture(f"{known}_unet"), vae, recipe), vae, None
    source = files.resolve_model(recipe.model)
    check_source(recipe, source)
    folder = config_folder(recipe, source)
    unet = files.unet_folder(folder)
    config = network_config(unet, files.UNETS[0], source)
    has_vae = (folder / "vae" / files.CONFIG_NAME).is_file()
    found = network_config(folder / "vae", "AutoencoderKL", source) if has_vae else None
    return _resized(config, found, recipe), found, folder


def _resized(unet: dict[str, Any], vae: dict[str, Any] | None, recipe: Recipe) -> dict[str, Any]:
    """The UNet's config with latents of the recipe's resolution."""
    if recipe.resolution is None or vae is None:
        return unet
    halved = len(vae.get("block_out_channels") or ()) - 1
    return {**unet, "sample_size": max(1, recipe.resolution >> max(0, halved))}


def network_config(folder: Path, kind: str, source: Path) -> dict[str, Any]:
    """config.json of a network, checked against the headers of its weights. Raises ModelError."""
    path = folder / files.CONFIG_NAME
    named = files.read_object(path).get("_class_name")
    kind = named if kind == files.UNETS[0] and named in files.UNETS else kind
    config = files.read_config(path, kind)
    shapes = files.tensor_shapes(source, error=ModelError).values() if source.is_file() else None
    files.check_size(path, config, kind, files.size_of_shapes(shapes) if shapes else files.size_of_weights(folder))
    return config


def _tokens(folder: Path | None) -> int:
    path = folder / "text_encoder" / files.CONFIG_NAME if folder is not None else None
    if path is None or not path.is_file():
        return architectures.TOKENS
    return int(files.read_config(path, "text encoder").get("max_position_embeddings", architectures.TOKENS))


def _prompts(*plans: PromptPlan) -> int:
    return len({prompt for plan in plans for group in (plan.forget, plan.cover, plan.retain) for prompt in group}) + 1


def check_memory(recipe: Recipe, device: Device | None = None) -> Prediction | None:
    """`forecast`; raises RecipeError, with figures and remedies that were tried, where it will not fit."""
    device = device or device_of()
    prediction = forecast(recipe, device)

    def again(overrides: list[str]) -> Prediction | None:
        try:
            return forecast(with_overrides(recipe, overrides), device)
        except PeckerError:  # keys that do not go together, or a network that cannot
            return None

    if prediction is not None and device.memory_bytes:
        enough(prediction, device.memory_bytes, again)
    return prediction


def lighter(recipe: Recipe) -> str:
    """What to do where memory runs out in spite of the forecast, in one line."""
    return f"lower what it takes, by one or more of: {', '.join(lighter_keys(recipe))}; or free memory"


def surely_fits(recipe: Recipe) -> bool:
    """Whether a class model that was loaded is so small against this machine that its forecast, seconds of work, need not be made.

    A rough bound from above: 40 copies of the weights on disk, and 200 activations of every level's size a sample and layer.
    """
    config, _, folder = configs_of(recipe) or ({}, None, None)
    if folder is None or not config.get("block_out_channels"):
        return True  # a hub name
    side = config.get("sample_size") or 0
    side = max(side) if isinstance(side, list | tuple) else side
    values = sum(int(width) * int(max(1, side >> i)) ** 2 for i, width in enumerate(config["block_out_channels"]))
    unet = files.unet_folder(folder)
    stored = sum(path.stat().st_size for path in unet.glob("*.safetensors"))
    needed = 40 * stored + 200 * FLOAT_BYTES * recipe.batch_size * values * (config.get("layers_per_block") or 2)
    return needed < device_of().memory_bytes / 2


def iteration_seconds(recipe: Recipe, prediction: Prediction, device: Device) -> tuple[dict[str, float], str] | None:
    """(seconds of an iteration by stage, where that comes from); None where nothing is known of the network.

    Both are estimates: FLOPs of the rehearsed iteration over a rate, which is measured on blocks of the network's shapes where
    the device is here, and else read off a data sheet.
    """
    found = configs_of(recipe)
    if found is None or not prediction.flops or not found[0].get("block_out_channels"):
        return None
    if device.here:
        batch = recipe.engine.micro_batch or recipe.batch_size
        rate = measured_rate(found[0], batch, recipe.precision, torch.device(device.kind))
        source = f"at {rate / 1e9:.3g} GFLOP/s, measured here on convolutions of its sizes"
    else:
        rate, source = device.sheet_rate(recipe.precision)
    return {stage: flops / rate for stage, flops in prediction.flops.items()}, source
