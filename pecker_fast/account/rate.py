"""FLOP/s that a device reaches on convolutions of a network's own shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pecker_fast.account.clock import stopwatch

MOST_FLOPS = 2e10  # of one timed pass: a second on a slow processor
ROUNDS = 3


def measured_rate(config: Mapping[str, Any], batch: int, precision: str, device: torch.device) -> float:
    """FLOP/s over forward and backward passes of norm, SiLU and 3×3 convolution at every level of a UNet's config.

    batch: samples that pass at once; fewer where a pass would take long. A level counts by its FLOPs.
    """
    flops = seconds = 0.0
    clock = stopwatch(device)
    for i, channels in enumerate(config["block_out_channels"]):
        most = math.isqrt(int(MOST_FLOPS // (54 * channels * channels)))  # a part of a large image stands for it
        size = max(1, min(_side(config) // 2**i, most))
        each = 3 * 2 * 9 * channels * channels * size * size
        n = int(max(1, min(batch, MOST_FLOPS // each)))
        block = nn.Sequential(nn.GroupNorm(1, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)).to(
            device
        )
        block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.zeros(n, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        times = []
        for _ in range(1 + ROUNDS):
            start = clock()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                y = block(x)
            y.sum().backward()
            times.append(clock() - start)
        flops += n * each
        seconds += min(times[1:])
    return flops / seconds


def _side(config: Mapping[str, Any]) -> int:
    size = config.get("sample_size") or 64
    return int(max(size) if isinstance(size, list | tuple) else size)
