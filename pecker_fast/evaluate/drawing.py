"""Prompts by index, and images of them drawn in fixed blocks: two models asked the same see the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.errors import PeckerError
from pecker_fast.evaluate.classes import Sampler

BLOCK = 250  # images of one call of a sampler; fixed, so that no figure depends on a batch size


class Prompt(NamedTuple):
    """A prompt as a sampler knows it, its row in the table of text embeddings, and as it was written."""

    row: int
    text: str


def numbered(texts: Iterable[str], start: int = 0) -> list[Prompt]:
    """Prompts whose rows follow one another from `start` on."""
    return [Prompt(start + i, text) for i, text in enumerate(texts)]


def dealt(count: int, samples: int, seed: int, group: str) -> Tensor:
    """Which of `count` prompts each of `samples` images is of, [samples] int64: all in turn, in an order drawn by seed.

    The order is drawn, so that fewer samples than prompts are no mere beginning of a sorted file.
    """
    order = torch.randperm(count, generator=draws.generator(seed, f"evaluate/{group}"))
    return order[torch.arange(samples) % count]


def drawn(sampler: Sampler, indices: Tensor, seed: int, group: str) -> Iterator[Tensor]:
    """Images of each of `indices` [N], block after block; seeds are hashes of (seed, group, number of the block).

    Raises:
        PeckerError: the sampler's images are not finite, or not one per index.
    """
    for block, wanted in enumerate(indices.split(BLOCK)):
        digest = hashlib.sha256(f"{seed}/{group}/{block}".encode()).digest()
        yield checked(sampler(wanted, int.from_bytes(digest[:4]) >> 1), len(wanted), group)


def drawn_with_seeds(
    sampler: Sampler, indices: Sequence[int], images: int, seeds: Sequence[int], group: str
) -> Iterator[Tensor]:
    """`images` images of each of `indices`, one call a prompt with its own of `seeds`; raises as `drawn`."""
    for index, seed in zip(indices, seeds, strict=True):
        yield checked(sampler(torch.full((images,), index), seed), images, group)


def checked(images: Tensor, count: int, group: str) -> Tensor:
    """`images`, if they are `count` finite ones [N, C, H, W]."""
    if images.ndim != 4 or len(images) != count:
        raise PeckerError(f"the sampler was asked for {count} images and returned {tuple(images.shape)}")
    if not images.isfinite().all():  # a detector would see no concept in them, and a broken model would look unlearned
        raise PeckerError(f"the sampler drew {group} images that are not finite: the generator has diverged")
    return images
