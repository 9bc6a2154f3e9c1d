"""One pass through a network without memory: what its config promises and cannot do is found before weights are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import files

TOKENS = 4  # of a text; the network does not care how many
TIME_IDS = 6  # SDXL: original size, crop, target size
SIDE = 8  # of a latent that a VAE decodes


def trial_pass(network: nn.Module, where: Path | str) -> None:
    """Run a diffusers network that lies on the meta device once, for shapes alone. Raises ModelError naming `where`."""
    run = _PASSES.get(type(network).__name__)
    if run is None:
        return
    what = f"its config makes a {type(network).__name__} that cannot run"
    no_form = contextlib.suppress(NotImplementedError)  # of an operation without memory: nothing is known of it
    with files.guarded(where, what), no_form, torch.no_grad(), torch.device("meta"):
        run(network)


def _size(config: Any) -> tuple[int, int]:
    """(height, width) that the network was trained on; without one the least that it can halve."""
    size = config.sample_size or 2 ** len(config.block_out_channels)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if type(height) is not int or type(width) is not int:
        raise TypeError(f"sample_size {size!r} is no whole number, nor two")
    return height, width


def _same_size(output: Tensor, x: Tensor) -> None:
    if output.shape[2:] != x.shape[2:]:
        raise ValueError(f"it makes {list(output.shape[2:])} of {list(x.shape[2:])} pixels")


def _class_unet(unet: Any) -> None:
    x, t = torch.zeros(1, unet.config.in_channels, *_size(unet.config)), torch.zeros(1, dtype=torch.long)
    labels = None if unet.class_embedding is None else torch.zeros(1, dtype=torch.long)
    _same_size(unet(x, t, class_labels=labels, return_dict=False)[0], x)


def _text_unet(unet: Any) -> None:
    config = unet.config
    width = config.cross_attention_dim
    text = torch.zeros(1, TOKENS, width if isinstance(width, int) else width[0])
    given: dict[str, Any] = {"encoder_hidden_states": text}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, TIME_IDS)}
    x = torch.zeros(1, config.in_channels, *_size(config))
    _same_size(unet(x, torch.zeros(1, dtype=torch.long), **given, return_dict=False)[0], x)


def _vae(vae: Any) -> None:
    config = vae.config
    image = vae.decode(torch.zeros(1, config.latent_channels, SIDE, SIDE), return_dict=False)[0]
    if image.shape[1] != 3:
        raise ValueError(f"it decodes images of {image.shape[1]} channels, 3 are needed")
    latent = vae.encode(image).latent_dist.mode()
    if latent.shape[2:] != (SIDE, SIDE):
        raise ValueError(f"an image of {SIDE}×{SIDE} latents is encoded to {list(latent.shape[2:])}")


_PASSES: dict[str, Callable[[Any], None]] = {
    "UNet2DModel": _class_unet,
    "UNet2DConditionModel": _text_unet,
    "AutoencoderKL": _vae,
}
