"""The VAE: pictures 3×32×32 to latents 4×8×8 and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.pretrain.fit import fit, resumable
from pecker_fast.pretrain.shapes.folder import read_network, write_network
from pecker_fast.pretrain.shapes.settings import LATENT_CHANNELS, SIZE, ShapesSettings

BATCH = 256  # of a pass without gradients


def build_vae(settings: ShapesSettings, seed: int) -> Any:
    """An AutoencoderKL with fresh weights, a function of the seed."""
    from diffusers import AutoencoderKL

    levels = len(settings.vae_channels)
    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(seed, "shapes-vae-init").initial_seed())
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=LATENT_CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=settings.vae_channels,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=SIZE,
        )


def vae_loss(vae: Any, x: Tensor, settings: ShapesSettings, g: torch.Generator) -> Tensor:
    """Squared and absolute error per pixel value, and `settings.kl` · KL(posterior ‖ N(0, 1)) per pixel value.

    x: pictures `[n, 3, H, W]` in [-1, 1]; the latent is drawn from its posterior.
    """
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g).to(x.device)
    error = vae.decode(z).sample - x
    return error.square().mean() + 0.5 * error.abs().mean() + settings.kl * posterior.kl().sum() / x.numel()


def train_vae(folder: Path, pool: Tensor, settings: ShapesSettings, seed: int, device: torch.device) -> Any:
    """The VAE in `folder`, trained on the pool (uint8 `[n, 3, H, W]`) where it is not stored yet.

    Its config's `scaling_factor` is 1 / the standard deviation of the pool's latents.
    """
    vae = build_vae(settings, seed)
    if not (folder / "config.json").is_file() or not read_network(vae, folder):
        plan = settings.vae
        vae = vae.to(device=device, memory_format=torch.channels_last)

        def loss_at(step: int) -> Tensor:
            g = draws.generator(seed, "shapes-vae", step)
            x = as_floats(pool[torch.randint(len(pool), (plan.batch_size,), generator=g)]).to(device)
            return vae_loss(vae, x.contiguous(memory_format=torch.channels_last), settings, g)

        state, save, _ = resumable(folder.parent, "vae", vae, plan)
        fit("vae", state, loss_at, plan, save)
        vae.register_to_config(scaling_factor=1.0)
        std = encode(vae, pool[: 16 * BATCH]).std().item()
        vae.register_to_config(scaling_factor=round(1 / std, 4))
        write_network(vae, folder)
        vae = build_vae(settings, seed)
        read_network(vae, folder)
    from pecker_fast import files

    vae.register_to_config(scaling_factor=files.read_json(folder / files.CONFIG_NAME)["scaling_factor"])
    return vae.to(device)


def as_floats(images: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Any, pool: Tensor) -> Tensor:
    """Scaled latents `[n, 4, h, w]`, the means of the posteriors, of uint8 pictures."""
    parts = [vae.encode(as_floats(part).to(vae.device)).latent_dist.mean.cpu() for part in pool.split(BATCH)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures float32 `[n, 3, H, W]` in [-1, 1] of scaled latents."""
    parts = [vae.decode(part.to(vae.device) / vae.config.scaling_factor).sample for part in latents.split(BATCH)]
    return torch.cat([part.cpu().clamp(-1, 1) for part in parts])


def psnr_db(vae: Any, pool: Tensor) -> float:
    """Peak signal-to-noise ratio of the round trip of uint8 pictures, in dB."""
    error = F.mse_loss(decode(vae, encode(vae, pool)), as_floats(pool)).item()
    return 10 * math.log10(4 / error)
