"""The teacher: the UNet and the text encoder that conditions it, trained together on latents and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import draws
from pecker_fast.data import TEMPLATES, caption
from pecker_fast.networks import Schedule
from pecker_fast.pretrain.fit import fit, resumable
from pecker_fast.pretrain.output import TEACHER
from pecker_fast.pretrain.settings import Settings
from pecker_fast.pretrain.shapes.folder import TEXT_WEIGHTS, read_network, write_network
from pecker_fast.pretrain.shapes.settings import LATENT_CHANNELS, LATENT_SIZE, ShapesSettings
from pecker_fast.pretrain.shapes.tokenizer import token_ids


def unet_config(settings: ShapesSettings) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel."""
    levels = len(settings.unet_channels)
    return {
        "sample_size": LATENT_SIZE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        "block_out_channels": settings.unet_channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * levels,
        "up_block_types": ("CrossAttnUpBlock2D",) * levels,
        "attention_head_dim": tuple(width // settings.unet_head_dim for width in settings.unet_channels),
        "cross_attention_dim": settings.text_width,
        "norm_num_groups": 8,
    }


def build_unet(settings: ShapesSettings, seed: int) -> Any:
    """A UNet2DConditionModel with fresh weights, a function of the seed."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(seed, "shapes-unet-init").initial_seed())
        return UNet2DConditionModel(**unet_config(settings))


def build_text_encoder(settings: ShapesSettings, tokenizer: Any, seed: int) -> Any:
    """A CLIPTextModel with fresh weights, a function of the seed."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_width,
        intermediate_size=4 * settings.text_width,
        projection_dim=settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(seed, "shapes-text-init").initial_seed())
        return CLIPTextModel(config)


class Captioned:
    """Latents with what they show, and the tokens of every caption there is for it.

    latents: float32 `[n, 4, h, w]`. words: int64 `[n, 4]`, see `pecker_fast.data.shapes`.
    """

    def __init__(self, latents: Tensor, words: Tensor, tokenizer: Any) -> None:
        self.latents = latents
        rows, self.rows = words.unique(dim=0, return_inverse=True)
        texts = [caption(row, i) for row in rows.tolist() for i in range(len(TEMPLATES))]
        self.tokens = token_ids(tokenizer, texts).view(len(rows), len(TEMPLATES), -1)
        self.nothing = token_ids(tokenizer, [""])[0]

    def batch(self, settings: Settings, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_0 `[n, 4, h, w]` and token ids `[n, L]`: one random caption each, or, at `label_dropout`, none."""
        n = settings.batch_size
        index = torch.randint(len(self.rows), (n,), generator=g)
        ids = self.tokens[self.rows[index], torch.randint(len(TEMPLATES), (n,), generator=g)]
        dropped = torch.rand(n, 1, generator=g) < settings.label_dropout
        return self.latents[index], torch.where(dropped, self.nothing, ids)


def timesteps(n: int, total: int, lateness: float, g: torch.Generator) -> Tensor:
    """int64 `[n]` in [0, total), with a density ∝ t^(lateness − 1); 1 = uniform."""
    return (total * torch.rand(n, generator=g) ** (1 / lateness)).long().clamp(max=total - 1)


def weighted_error(output: Tensor, e: Tensor, t: Tensor, schedule: Schedule, snr_clip: float) -> Tensor:
    """E w(t) ‖e − ε(x_t, t, c)‖² per element over one batch, w = min(SNR, snr_clip) / SNR with SNR = a_t² / b_t².

    DDPM's objective (arXiv 2006.11239, Eq. 14) under min-SNR weighting (arXiv 2303.09556, Eq. 4).
    """
    a, b = schedule.coefficients(t)
    weight = (snr_clip * b.square() / a.square()).clamp(max=1)
    return (weight * (output - e).square()).mean()


def train_teacher(
    folder: Path, data: Captioned, tokenizer: Any, schedule: Schedule, settings: ShapesSettings, seed: int,
    device: torch.device,
) -> int | None:  # fmt: skip
    """Train UNet and text encoder, or go on training them, and write `unet/` and `text_encoder/`.

    Returns the step an interrupted run was taken up from.
    """
    parts: Any = nn.ModuleDict(
        {"unet": build_unet(settings, seed), "text_encoder": build_text_encoder(settings, tokenizer, seed)}
    )
    unet, text_encoder = parts["unet"], parts["text_encoder"]
    if read_network(unet, folder / "unet"):  # written last of the two
        return None
    parts.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = settings.teacher
    state, save, resumed_from = resumable(folder, TEACHER, parts, plan)
    schedule = schedule.to(device)

    def loss_at(step: int) -> Tensor:
        g = draws.generator(seed, "shapes-teacher", step)
        x_0, ids = data.batch(plan, g)
        t = timesteps(len(x_0), schedule.num_timesteps, settings.lateness, g)
        e = torch.randn(x_0.shape, generator=g)
        x_0, ids, t, e = (value.to(device, non_blocking=True) for value in (x_0, ids, t, e))
        x_t = schedule.add_noise(x_0, e, t).contiguous(memory_format=torch.channels_last)
        output = unet(x_t, t, encoder_hidden_states=text_encoder(ids)[0]).sample
        return weighted_error(output, e, t, schedule, settings.snr_clip)

    fit("teacher", state, loss_at, plan, save)
    write_network(text_encoder, folder / "text_encoder", TEXT_WEIGHTS)
    write_network(unet, folder / "unet")
    return resumed_from
