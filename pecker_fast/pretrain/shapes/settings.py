"""What the shapes pipeline is built of and how long each part of it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pecker_fast.pretrain.settings import Settings

LENGTH = 24  # tokens of a prompt, with both ends
SIZE = 32  # pixels
LATENT_SIZE, LATENT_CHANNELS = 8, 4

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def _teacher() -> Settings:
    return Settings(
        steps=8000, batch_size=32, lr=1e-3, lr_warmup=0.03, lr_decay=True, weight_decay=1e-3, clip_norm=1.0,
        ema=0.999, label_dropout=0.1, flip=False, storage="float16", checkpoint_every=1000,
    )  # fmt: skip


def _vae() -> Settings:
    return Settings(steps=2500, batch_size=16, lr=2e-3, lr_warmup=0.05, lr_decay=True, clip_norm=1.0)


def _judge() -> Settings:
    return Settings(steps=1500, batch_size=64, lr=3e-3, lr_warmup=0.2, lr_decay=True, weight_decay=1e-2)


def _distill() -> tuple[dict[str, Any], ...]:
    """All captions are learnt, whatever is named to be forgotten. The teacher is guided at first; towards a guided score θ comes
    to rest with purple between red and blue (75 % right), and only without guidance with colours as the teacher has them."""
    both = {
        "forget": {"concept": "circle", "captions": "captions.txt"}, "cover": "square", "retain": "captions.txt",
        "batch_size": 48, "alpha": 1.0, "timesteps": {"init": 625, "min": 20, "max": 980},
    }  # fmt: skip
    guided = {"guidance": {"teacher": 2.0}}
    plain = {"lr": {"generator": 1e-4, "score": 1e-3}}
    return (
        {"share": 7 / 29, **both, **guided, "ema": 0.99, "lr": {"generator": 2e-4, "score": 1e-3}},
        {"share": 11 / 29, **both, **guided, "ema": 0.995, "lr": {"generator": 1.5e-4, "score": 2e-3}},
        {"share": 6 / 29, **both, **plain, "ema": 0.98},
        {"share": 5 / 29, **both, **plain, "ema": 0.99},
    )


def _second() -> Settings:
    return Settings(steps=3000, batch_size=64, lr=3e-3, lr_warmup=0.1, lr_decay=True, weight_decay=1e-2)


@dataclass(frozen=True)
class ShapesSettings:
    """Everything that shapes a run of `pretrain shapes`.

    teacher: of UNet and text encoder together. vae, judge, second: of those, and of the second judge.
    pool: pictures drawn once; their latents are all that the UNet is trained on.
    vae_channels: of each VAE level, three levels for a factor of 4. kl: weight of the KL divergence, in nats per pixel
        value, beside the squared and absolute error.
    snr_clip: the squared error of a timestep weighs min(SNR, snr_clip) / SNR (min-SNR, arXiv 2303.09556).
    lateness: timesteps are drawn with a density ∝ t^(lateness − 1): the place of the shape is settled by the noisiest.
    unet_channels, unet_head_dim: of each UNet level; every level attends to the text.
    text_width, text_layers, text_heads: of the CLIP text encoder.
    judge_noise: standard deviation at most of the noise added to the judge's input.
    references: pictures whose features the judge keeps.
    samples, sampler_steps, guidances: of the pictures the figures are made from.
    t_init: timestep at which the one-step generator takes its step.
    distill_steps: steps of distilling a one-step generator beside the teacher, in rounds that go on from one another.
    distill: for each round its `share` of the steps and the recipe keys that are not the recipe's defaults.
    """

    teacher: Settings = field(default_factory=_teacher)
    vae: Settings = field(default_factory=_vae)
    judge: Settings = field(default_factory=_judge)
    second: Settings = field(default_factory=_second)
    pool: int = 24_000
    vae_channels: tuple[int, int, int] = (16, 32, 32)
    kl: float = 1e-3
    snr_clip: float = 5.0
    lateness: float = 2.0
    unet_channels: tuple[int, ...] = (32, 64)
    unet_head_dim: int = 16
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 4
    judge_width: int = 12
    second_width: int = 48
    judge_features: int = 48
    judge_noise: float = 0.15
    references: int = 2000
    samples: int = 500
    sampler_steps: int = 25
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0)
    t_init: int = 625
    distill_steps: int = 2900
    distill: tuple[dict[str, Any], ...] = field(default_factory=_distill)
