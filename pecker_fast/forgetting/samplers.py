"""Samplers: one step of a generator, and the teacher's multi-step DDIM. Images leave as float32 [N, C, H, W] in [-1, 1]."""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import draws, files
from pecker_fast.forgetting.losses import generate
from pecker_fast.networks import Denoiser

BATCH_SIZE = 256  # samples at a time, at most
BATCH_NUMBERS = 1 << 18  # and no more numbers than these: 16 latents of 4×64×64


def sample_noise(denoiser: Denoiser, n: int, seed: int) -> Tensor:
    """z ~ N(0, I), [n, C, H, W], a function of the seed alone (drawn on the CPU, so equal on every device)."""
    return torch.randn(n, *denoiser.sample_shape, generator=draws.generator(seed, "sample")).to(denoiser.device)


def batch_of(denoiser: Denoiser) -> int:
    """Samples of this network that are drawn at a time."""
    return max(1, min(BATCH_SIZE, BATCH_NUMBERS // math.prod(denoiser.sample_shape)))


@torch.no_grad()
def one_step_sample(
    generator: Denoiser, labels: Tensor, seed: int, t_init: int, batch_size: int | None = None
) -> Tensor:
    """Images of the one-step generator θ for conditions [N]: x_g from z, [N, C, H, W]."""
    z = sample_noise(generator, labels.shape[0], seed)
    size = batch_size or batch_of(generator)
    parts = zip(z.split(size), labels.to(generator.device).split(size))
    return torch.cat([generator.to_images(generate(generator, z_i, c_i, t_init)) for z_i, c_i in parts])


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser, labels: Tensor, steps: int, seed: int, batch_size: int | None = None, guidance: float = 1.0
) -> Tensor:
    """Images of the multi-step sampler (DDIM, η = 0, diffusers' scheduler, x_0 bounded as the model's own sampler does it)
    for conditions [N], [N, C, H, W]."""
    return torch.cat([denoiser.to_images(x) for x in ddim(denoiser, labels, steps, seed, batch_size, guidance)])


@torch.no_grad()
def ddim(
    denoiser: Denoiser, labels: Tensor, steps: int, seed: int, batch_size: int | None = None, guidance: float = 1.0
) -> Iterator[Tensor]:
    """What `ddim_sample` makes images of, batch by batch: samples of the network, [n, C, H, W] each."""
    z = sample_noise(denoiser, labels.shape[0], seed)
    size = batch_size or batch_of(denoiser)
    for x, c in zip(z.split(size), labels.to(denoiser.device).split(size)):
        yield denoised(denoiser, x, c, steps, guidance)


def ddim_scheduler(denoiser: Denoiser, steps: int) -> Any:
    """diffusers' DDIMScheduler on the network's own schedule, its timesteps set, x_0 bounded as the model's sampler does it."""
    from diffusers import DDIMScheduler

    schedule = denoiser.schedule
    bounds = {"clip_sample": False, **schedule.clipping}
    scheduler = DDIMScheduler(
        **schedule.config, **bounds, prediction_type=schedule.prediction_type, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def denoised(
    denoiser: Denoiser, x: Tensor, c: Tensor, steps: int, guidance: float = 1.0, start: int | None = None
) -> Tensor:
    """Samples of the network, [n, C, H, W], from x_t [n, C, H, W] at timestep `start` by what is left of `steps` DDIM steps;
    None = from pure noise by all of them."""
    scheduler = ddim_scheduler(denoiser, steps)
    for t in scheduler.timesteps:
        if start is None or int(t) <= start:
            output = denoiser.output(x, t.to(x.device).expand(x.shape[0]), c, guidance)
            x = scheduler.step(output, t, x).prev_sample
    return x


def grid_labels(classes: Sequence[int], columns: int) -> Tensor:
    """Labels of an image grid, one class a row, [len(classes) · columns]."""
    return torch.tensor(list(classes)).repeat_interleave(columns)


def save_grid(images: Tensor, columns: int, path: Path, scale: int | None = None) -> Path:
    """Write images [N, C, H, W] in [-1, 1] as one PNG, `columns` a row with a thin gap; small images are enlarged (`scale` ×)."""
    from PIL import Image

    n, channels, height, width = images.shape
    scale = scale or max(1, 48 // max(height, width))
    gap = max(1, scale // 3)
    pixels = ((images.detach().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = -(-n // columns)
    tile_h, tile_w = height * scale + gap, width * scale + gap
    canvas = torch.full((channels, rows * tile_h + gap, columns * tile_w + gap), 96, dtype=torch.uint8)
    for i in range(n):
        top, left = gap + i // columns * tile_h, gap + i % columns * tile_w
        canvas[:, top : top + height * scale, left : left + width * scale] = pixels[i]
    image = Image.fromarray(canvas[0].numpy() if channels == 1 else canvas[:3].permute(1, 2, 0).contiguous().numpy())
    png = io.BytesIO()
    image.save(png, format="PNG")
    files.write_bytes(path, png.getvalue())
    return path
