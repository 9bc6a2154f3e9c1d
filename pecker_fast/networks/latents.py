"""Between a UNet's latents and what the VAE takes and gives, as Stable Diffusion's pipelines of diffusers have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast.errors import ModelError

_XL = "StableDiffusionXLPipeline"


def to_decoder(latents: Tensor, config: Any) -> Tensor:
    """What the VAE decodes, [N, C, h, w], of the UNet's latents: z · std / factor + mean, where the VAE has both."""
    scaled = latents / config.scaling_factor
    statistics = _statistics(config, latents)
    return scaled if statistics is None else scaled * statistics[1] + statistics[0]


def from_encoder(latents: Tensor, config: Any) -> Tensor:
    """The inverse of `to_decoder`."""
    statistics = _statistics(config, latents)
    return (latents if statistics is None else (latents - statistics[0]) / statistics[1]) * config.scaling_factor


def _statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """(mean, std), [1, C, 1, 1] each; None where the VAE has not both."""
    mean, std = config.latents_mean, config.latents_std
    if mean is None or std is None:
        return None
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


def check_vae(config: Mapping[str, Any], pipeline: str, where: Path) -> None:
    """Raise ModelError where the VAE of a pipeline is of another kind, or has a key that stock diffusers would not follow.

    config: vae/config.json, at `where`.
    """
    name = config.get("_class_name") or "AutoencoderKL"
    if name != "AutoencoderKL":
        raise ModelError(f"{where}: the VAE is a {str(name)[:80]}; only AutoencoderKL is supported")
    if _number(config.get("scaling_factor", 1.0)) in (None, 0.0):
        raise ModelError(
            f"{where}: scaling_factor {config['scaling_factor']!r} is no number that latents can be scaled by"
        )
    if config.get("shift_factor") not in (None, 0):
        raise ModelError(f"{where}: shift_factor {config['shift_factor']!r} is not supported: a {pipeline} ignores it")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return
    if pipeline != _XL:
        key = "latents_mean" if mean is not None else "latents_std"
        raise ModelError(f"{where}: {key} is not supported: a {pipeline} ignores it; only a {_XL} follows it")
    if mean is None or std is None:
        raise ModelError(f"{where}: latents_mean and latents_std belong together, and one of them is missing")
    channels = config.get("latent_channels", 4)
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = [_number(value) for value in values] if isinstance(values, list | tuple) else []
        if len(numbers) != channels or None in numbers or (key == "latents_std" and 0.0 in numbers):
            raise ModelError(f"{where}: {key} must be {channels} finite numbers, one a channel of the latents")


def _number(value: Any) -> float | None:
    """A finite number as such; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
