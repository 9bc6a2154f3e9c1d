"""What kind of UNet a config describes, and the one line in which an unsupported one is refused. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast.errors import ModelError

# input channels beside the latents' own 4 → what the model is for
_PURPOSES = {9: "an inpainting model", 5: "a depth model", 8: "an image-editing model", 7: "an upscaler"}
_NAMES = {"Inpaint": "an inpainting model", "Depth": "a depth model", "Pix2Pix": "an image-editing model"}
_PROMISED = "inpainting and depth models are not supported yet"
# keys of a UNet2DConditionModel that want more than a text beside the image, and the values that do not
_TEXT_ONLY: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "addition_embed_type": (None, "text_time"),
}
_WHY = {"time_cond_proj_dim": "; it is a distilled consistency model, give the model it was distilled from"}


def other_pipeline(name: Any) -> str:
    """What is said of a pipeline by its class: of inpainting, depth and the like; empty for others."""
    what = next((what for piece, what in _NAMES.items() if isinstance(name, str) and piece in name), None)
    return f": {what}; {_PROMISED}" if what else ""


def other_channels(channels: Any) -> str | None:
    """What a UNet with so many input channels is, where that is known and not supported."""
    return _PURPOSES.get(channels) if isinstance(channels, int) else None


def check_channels(unet_in: Any, unet_out: Any, latent: Any, where: Path | str) -> None:
    """Raise ModelError unless a UNet takes and gives the VAE's latents, and nothing beside them."""
    if unet_in == latent and unet_out == unet_in:
        return
    what = other_channels(unet_in)
    raise ModelError(
        f"{where}: the UNet takes {unet_in} channels and gives {unet_out}, the VAE's latents have {latent}"
        f"{f': {what}' if what else ''}; {_PROMISED}"
    )


def check_text_unet(config: Mapping[str, Any], latent: Any, where: Path) -> None:
    """Raise ModelError where a UNet's config wants more than noisy latents, a timestep and a text. latent: the VAE's channels."""
    name = config.get("_class_name") or "UNet2DConditionModel"
    if name != "UNet2DConditionModel":
        raise ModelError(f"{where}: the UNet is a {str(name)[:80]}; a text-to-image model has a UNet2DConditionModel")
    check_channels(config.get("in_channels", 4), config.get("out_channels", 4), latent, where)
    for key, neutral in _TEXT_ONLY.items():
        if (value := config.get(key)) not in neutral:
            raise ModelError(
                f"{where}: {key} {value!r} is not supported: the UNet wants more than text{_WHY.get(key, '')}"
            )


def check_class_unet(config: Mapping[str, Any], timesteps: int, where: Path) -> None:
    """Raise ModelError where a UNet2DModel's config is not that of a class-conditional denoiser over `timesteps` steps."""
    if (kind := config.get("class_embed_type")) is not None:
        raise ModelError(
            f"{where}: class_embed_type {kind!r} is not supported: classes must be numbers of an embedding table "
            "(num_class_embeds alone)"
        )
    if not config.get("num_class_embeds"):
        raise ModelError(
            f"{where}: the model is unconditional (num_class_embeds is empty), so there is no class to forget"
        )
    if config.get("sample_size") is None:
        raise ModelError(
            f"{where}: sample_size is missing, so the size of the images is not known; write it into the config: pixels a "
            "side, or [height, width]"
        )
    given, taken = config.get("out_channels", 3), config.get("in_channels", 3)
    if given != taken:
        learned = ": it predicts variances too (learned sigma)" if given == 2 * taken else ""
        raise ModelError(
            f"{where}: the UNet gives {given} channels and takes {taken}{learned}; as many output as input channels are needed"
        )
    embedding = config.get("time_embedding_type", "positional")
    if embedding == "fourier":
        raise ModelError(
            f"{where}: time_embedding_type 'fourier' is not supported: the network takes noise levels, not timesteps"
        )
    rows = config.get("num_train_timesteps")
    if embedding == "learned" and isinstance(rows, int) and rows < timesteps:
        raise ModelError(f"{where}: num_train_timesteps {rows} is less than the {timesteps} timesteps of its schedule")
