"""Will a pretraining fit into memory? Found before it starts, and refused with what would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pecker_fast.account.memory import Prediction, TooLarge, build, predict_fit, size
from pecker_fast.errors import RecipeError
from pecker_fast.machine import device_of
from pecker_fast.pretrain.settings import Settings, with_size

LIGHTER = "give a smaller --batch-size, fewer or narrower --channels, or a smaller --size; or free memory"
KEPT = 100  # activations of every level's size that a step may keep, rather too many
Config = Mapping[str, Any]


def predict_teacher(config: Config, batch_size: int, beside_bytes: int = 0) -> Prediction:
    """Peak memory of a step of the teacher. config: of a UNet2DModel or UNet2DConditionModel."""
    channels, side, width = config["in_channels"], config["sample_size"], config.get("cross_attention_dim")

    def loss_of(unet: nn.Module) -> Tensor:
        x = torch.empty(batch_size, channels, side, side)
        t = torch.zeros(batch_size, dtype=torch.long)
        if width:
            text = torch.empty(batch_size, config["tokens"], width)
            return F.mse_loss(unet(x, t, encoder_hidden_states=text, return_dict=False)[0], x)
        return F.mse_loss(unet(x, t, class_labels=t, return_dict=False)[0], x)

    return predict_fit(lambda: build({k: v for k, v in config.items() if k != "tokens"}).train(), loss_of, beside_bytes)


def check(
    config_of: Callable[[Settings], Config], settings: Settings, beside_bytes: int, available_bytes: int | None = None
) -> Prediction | None:
    """The teacher's prediction; None where it is so small that none is made. Raises TooLarge, with options that were tried.

    config_of: the UNet's config under other settings. available_bytes: None = of the device that is used.
    """
    available = device_of().memory_bytes if available_bytes is None else available_bytes
    config = config_of(settings)
    values = sum(c * (config["sample_size"] >> i) ** 2 for i, c in enumerate(config["block_out_channels"]))
    bound = 4 * settings.batch_size * values * KEPT * config["layers_per_block"] + beside_bytes
    if not available or bound < available / 8:
        return None
    prediction = predict_teacher(config, settings.batch_size, beside_bytes)
    if prediction.peak_bytes <= available:
        return prediction

    def fits(option: str, tried: Settings) -> str | None:
        peak = predict_teacher(config_of(tried), tried.batch_size, beside_bytes).peak_bytes
        return f"{option} takes {size(peak)}" if peak <= available else None

    found = [_smaller_batch(settings, prediction, available, fits)]
    narrow = tuple(width // 2 for width in config["block_out_channels"])
    with contextlib.suppress(RecipeError):  # too narrow
        found.append(fits(f"--channels {','.join(map(str, narrow))}", with_size(settings, None, narrow)))
    helps = "; ".join(one for one in found if one) or "it needs a smaller --size, or a larger machine"
    parts = sorted(prediction.parts.items(), key=lambda item: -item[1])[:3]
    raise TooLarge(
        f"memory: training at {config['sample_size']} pixels in batches of {settings.batch_size} needs about "
        f"{size(prediction.peak_bytes)} ({', '.join(f'{name} {size(n)}' for name, n in parts)}), {size(available)} are "
        f"available; {helps}",
        prediction.table(),
    )


def _smaller_batch(
    settings: Settings, prediction: Prediction, available: int, fits: Callable[[str, Settings], str | None]
) -> str | None:
    """The greatest half, quarter, … of the batch that fits. Activations are proportional to it; what that says is tried."""
    batch, each = settings.batch_size // 2, prediction.parts["activations"] / settings.batch_size
    while batch and prediction.state_bytes + batch * each > available:
        batch //= 2
    while batch:
        if (found := fits(f"--batch-size {batch}", replace(settings, batch_size=batch))) is not None:
            return found
        batch //= 2
    return None
