"""The tensor lists that benchmarks run on, and what one forward pass of their networks costs."""

from __future__ import annotations

import math
import os
from functools import lru_cache

import torch

TINY = os.environ.get("BENCH_SCALE", "full") == "tiny"  # seconds for everything: shows that it works, times nothing

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape), in named_parameters order

# Stable Diffusion 1.5's UNet, where it differs from diffusers' UNet2DConditionModel defaults.
SD15_CONFIG = {"sample_size": 64, "cross_attention_dim": 768}
SD15_TENSORS, SD15_WEIGHTS = 686, 859_520_964
FLAT = 1 << 25

# FLOPs of one forward pass for one sample (64×64 latents with 77 tokens, 32×32 pixels), torch's FlopCounterMode.
FORWARD_FLOPS = {"sd15": 803_273_441_280, "cifar10": 12_443_713_536}
FORWARDS_PER_ITERATION = 22  # a backward pass counts as two; docs/performance.md


def _named(module: torch.nn.Module) -> Shapes:
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def size(shapes: Shapes) -> int:
    """Number of weights."""
    return sum(math.prod(shape) for _, shape in shapes)


@lru_cache
def sd15() -> Shapes:
    """All 686 tensors of the SD 1.5 UNet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return _named(UNet2DConditionModel(**SD15_CONFIG))


@lru_cache
def sd15_sixteenth() -> Shapes:
    """A sixteenth of `sd15` with its mix of sizes: 43 tensors, 54.2 M weights (0.9 % more than a sixteenth).

    The list is sorted by size, the largest first (equal ones in model order), and cut into runs of 16; every even run
    gives its 6th tensor, every odd run its 15th.
    """
    ordered = sorted(sd15(), key=lambda entry: -math.prod(entry[1]))
    runs = [ordered[i : i + 16] for i in range(0, len(ordered), 16)]
    chosen = [run[(5, 14)[i % 2]] for i, run in enumerate(runs) if len(run) > (5, 14)[i % 2]]
    names = {name for name, _ in chosen}
    return tuple(entry for entry in sd15() if entry[0] in names)


@lru_cache
def cifar10() -> Shapes:
    """The DDPM network that recipe cifar10 expects: 329 tensors, 35.8 M weights."""
    from diffusers import UNet2DModel

    from pecker_fast.pretrain.settings import settings_for, unet_config

    with torch.device("meta"):
        return _named(UNet2DModel(**unet_config(settings_for("cifar10"), 3, 32, 10)))


def flat() -> Shapes:
    """One tensor of 32 M weights."""
    return (("flat", (FLAT,)),)


NETWORKS = {"sd15": sd15, "sd15_sixteenth": sd15_sixteenth, "cifar10": cifar10, "flat": flat}


def small(shapes: Shapes, side: int = 20, tensors: int = 12) -> Shapes:
    """A small copy of the same kinds of tensors: every n-th of the list, no dimension longer than `side`; one flat
    tensor keeps side² values."""
    if len(shapes) == 1:
        return tuple((name, (min(math.prod(shape), side * side + 3),)) for name, shape in shapes)
    step = -(-len(shapes) // tensors)
    return tuple((name, tuple(min(n, side) for n in shape)) for name, shape in shapes[::step])


def network(name: str) -> Shapes:
    """The list of a name; a small copy with BENCH_SCALE=tiny."""
    shapes = NETWORKS[name]()
    return small(shapes) if TINY else shapes


def length(n: int) -> int:
    """Values of a flat case."""
    return min(n, 4099) if TINY else n


def iteration_flops(name: str) -> float | None:
    """FLOPs of a training iteration with one sample, scaled down with the tensor list; None for a list that is no
    network."""
    if name == "flat":
        return None
    base = name.removesuffix("_sixteenth")
    return FORWARDS_PER_ITERATION * FORWARD_FLOPS[base] * size(network(name)) / size(NETWORKS[base]())
