"""What each shipped name is trained with, and the UNet it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from pecker_fast.errors import DataError, RecipeError

OFFICIAL_MULTIPLIERS = (1, 2, 2, 2, 4)


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a pretraining run, for one name.

    channels: of each UNet level, top to bottom; None = 128 · (1, 2, 2, 2, 4, 4 …), halving the image while it is even
        and at least 8 pixels: at 32×32 and 64×64 the UNets of SFD, with the time embedding, epsilon and padding of the
        DDPM paper's network (arXiv 2006.11239).
    attention_size: the first level of at most so many pixels attends to itself, beside the middle; 0 = no level does.
    lr_warmup: share of the steps that ramps up. lr_decay: whether the rest follows a cosine down to zero.
    ema: decay at most; it warms up as min(ema, (1 + n) / (10 + n)).
    label_dropout: share of the labels replaced by the null class, the last index.
    judge_shift: pixels of random shift at most. judge_noise: standard deviation of the noise added to its input.
    second_lr, second_width: of the second judge, which is of another architecture; it takes as many steps.
    distill: recipe keys of the distillation, where they are not the recipe's defaults.
    steps: for the digits, where the noise-prediction error on held-out digits (a fifth of them, left out) stops falling:
        past that the teacher learns the training digits by heart.
    storage: dtype of the weights on disk. The stored weights are the model: it is rounded first and measured after.
    """

    steps: int
    batch_size: int = 128
    lr: float = 2e-4
    lr_warmup: float = 0.005
    lr_decay: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    ema: float = 0.9999
    label_dropout: float = 0.1
    flip: bool = True
    storage: str = "float32"
    checkpoint_every: int = 5000

    channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    attention_size: int = 16
    attention_head_dim: int | None = None
    norm_num_groups: int = 32
    dropout: float = 0.1

    judge_steps: int = 20_000
    judge_lr: float = 2e-3
    judge_width: int = 64
    judge_features: int = 128
    judge_shift: int = 4
    judge_noise: float = 0.05
    judge_background: float | None = None  # value shifted in at the edges; None = the image mirrored
    second_lr: float = 1e-3
    second_width: int = 64
    held_out: float = 0.2

    samples: int = 2000
    sampler_steps: int = 50
    distill_steps: int = 0
    distill: dict[str, Any] = field(default_factory=dict)


SETTINGS: dict[str, Settings] = {
    "digits": Settings(
        steps=4000, lr=1.5e-3, lr_warmup=0.05, lr_decay=True, weight_decay=1e-3, clip_norm=None, ema=0.999,
        flip=False, storage="float16", checkpoint_every=1000, channels=(32, 48), layers_per_block=1, attention_size=0,
        attention_head_dim=24, norm_num_groups=8, dropout=0.0, judge_steps=1500, judge_lr=4e-3, judge_width=16,
        judge_features=32, judge_shift=1, judge_noise=0.1, judge_background=-1.0, second_lr=3e-3, second_width=32,
        distill_steps=2000,
        distill={"ema": 0.998, "alpha": 1.0, "lr": {"generator": 1e-4, "score": 1e-3}},
    ),
    "cifar10": Settings(steps=800_000),
    "stl10": Settings(steps=250_000),
    "images": Settings(steps=200_000),
}  # fmt: skip


FEW = 5000  # images: fewer get a network of half the width
EPOCHS, JUDGE_EPOCHS = 1000, 300  # at most, of an image folder
NUMBERS = 128 * 32 * 32  # pixels of a batch at most: the papers' batch at 32×32


def settings_for(
    name: str, steps: int | None = None, batch_size: int | None = None, channels: tuple[int, ...] | None = None
) -> Settings:
    """The settings of a name, some of them replaced: training steps, images of a step, channels of each level of the UNet.

    Raises `DataError` for unknown names, `RecipeError` for values that cannot be.
    """
    if name not in SETTINGS:
        raise DataError(f"unknown pretraining name {name!r}; choose one of {', '.join(SETTINGS)}")
    settings = SETTINGS[name]
    settings = settings if steps is None else replace(settings, steps=steps)
    return with_size(settings, batch_size, channels)


def with_size(settings: Settings, batch_size: int | None = None, channels: tuple[int, ...] | None = None) -> Settings:
    """Another batch, another width. Raises `RecipeError`."""
    if batch_size is not None:
        if not 1 <= batch_size <= 1 << 20:
            raise RecipeError(f"batch_size: {batch_size} is out of range, 1 to {1 << 20} expected")
        settings = replace(settings, batch_size=batch_size)
    if channels is not None:
        if not 1 <= len(channels) <= 8 or any(not 8 <= width <= 4096 or width % 8 for width in channels):
            given = ",".join(map(str, channels))[:60]
            raise RecipeError(
                f"channels: {given or 'nothing'}: one to eight multiples of 8 expected, such as 64,128,128"
            )
        head = settings.attention_head_dim
        fits = head is not None and not any(width % head for width in channels)
        groups = math.gcd(settings.norm_num_groups, *channels)
        settings = replace(
            settings, channels=channels, norm_num_groups=groups, attention_head_dim=head if fits else None
        )
    return settings


def fitted(settings: Settings, images: int, size: int, fixed: frozenset[str] = frozenset()) -> Settings:
    """The settings of an image folder, for as many images of so many pixels; `fixed` keys stay as they are.

    Larger images go in smaller batches; few images get smaller batches, a network of half the width and fewer steps, since
    training on would only teach them by heart.
    """
    batch = settings.batch_size
    if "batch_size" not in fixed:
        batch = max(8, min(batch, _power_of_two(NUMBERS // size**2), _power_of_two(images // 4)))
    channels = settings.channels
    if "channels" not in fixed and images < FEW:
        channels = tuple(width // 2 for width in widths_of(settings, size))
    steps = settings.steps if "steps" in fixed else min(settings.steps, max(2000, EPOCHS * images // batch))
    judge_steps = min(settings.judge_steps, max(1500, JUDGE_EPOCHS * images // 64))
    return replace(settings, batch_size=batch, channels=channels, steps=steps, judge_steps=judge_steps)


def options(batch_size: int | None, channels: tuple[int, ...] | None) -> str:
    """Those of the command that were given."""
    words = f" --batch-size {batch_size}" if batch_size is not None else ""
    return words + (f" --channels {','.join(map(str, channels))}" if channels is not None else "")


def _power_of_two(n: int) -> int:
    """The greatest power of two up to n, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


def widths_of(settings: Settings, sample_size: int) -> tuple[int, ...]:
    """Channels of every level of the UNet."""
    if settings.channels is not None:
        return settings.channels
    levels, side = 1, sample_size
    while side % 2 == 0 and side >= 8:
        levels, side = levels + 1, side // 2
    return tuple(128 * OFFICIAL_MULTIPLIERS[min(i, 4)] for i in range(levels))


def unet_config(settings: Settings, channels: int, sample_size: int, num_classes: int) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DModel: `channels` in and out, `num_classes` + 1 embeddings, the last one null.

    Raises `DataError` where the image cannot be halved often enough.
    """
    widths = widths_of(settings, sample_size)
    if sample_size % 2 ** (len(widths) - 1):
        raise DataError(f"images of {sample_size} pixels cannot be halved {len(widths) - 1} times; give another size")
    sizes = [sample_size // 2**i for i in range(len(widths))]
    attends = next((i for i, size in enumerate(sizes) if size <= settings.attention_size), None)
    kinds = ["Attn" if i == attends else "" for i in range(len(widths))]
    official = {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6, "downsample_padding": 0}
    return {
        **(official if settings.channels is None else {}),
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": settings.layers_per_block,
        "block_out_channels": widths,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "attention_head_dim": settings.attention_head_dim,
        "norm_num_groups": settings.norm_num_groups,
        "dropout": settings.dropout,
        "num_class_embeds": num_classes + 1,
    }


def lr_at(settings: Settings, step: int) -> float:
    """Learning rate of a step (counted from 0): a linear ramp, then flat, or a cosine to zero with `lr_decay`."""
    warmup = max(1, round(settings.steps * settings.lr_warmup))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if not settings.lr_decay:
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (settings.steps - warmup + 1)))
