"""The user's own images as a pool takes them: by the condition they are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pecker_fast.conditions import clean
from pecker_fast.data import as_channels, captioned_images, class_images
from pecker_fast.errors import DataError
from pecker_fast.forgetting import OwnImages, get_method
from pecker_fast.loading import Parts
from pecker_fast.networks import TextDenoiser
from pecker_fast.recipe import Recipe


def own_images(recipe: Recipe, parts: Parts, names: Sequence[str] | None) -> OwnImages | None:
    """Of `images: PATH`; None without. names: of the model's classes. Raises DataError where none of them is of a condition that
    the method draws images of."""
    branches = get_method(recipe.method).pools(recipe)
    if not recipe.images.is_folder or not branches:
        return None
    path, teacher, c = Path(recipe.images.source), parts.teacher, parts.conditions
    sides = {"own": c.forget, "cover": c.cover, "both": (*c.forget, *c.cover)}  # as `asked_for` has them
    wanted = {one for branch, whose in branches.items() for one in (c.retain if branch == "retain" else sides[whose])}
    if isinstance(teacher, TextDenoiser) and parts.text is not None:
        height, width = parts.text.pixels
        data, captions = captioned_images(path, _side(path, 3, height, width))
        of_forget = sorted(set(c.forget) & wanted)
        rows = _by_caption(path, captions, teacher.table.prompts) if captions else _of_all(len(data), of_forget)
        return OwnImages(
            _only(rows, wanted, recipe), lambda index: teacher.to_latents(data.batch(index).to(teacher.device))
        )
    channels, height, width = teacher.sample_shape
    own = c.forget[0] if len(c.forget) == 1 and c.forget[0] in wanted else None
    data = class_images(path, _side(path, channels, height, width), sorted(wanted), own, names)
    found = {label: (data.labels == label).nonzero()[:, 0] for label in sorted(wanted)}
    return OwnImages(_only(found, wanted, recipe), lambda index: as_channels(data.batch(index), channels))


def _side(path: Path, channels: int, height: int, width: int) -> int:
    if channels not in (1, 3) or height != width:
        raise DataError(f"{path}: images cannot be fitted to the model's samples of {channels}×{height}×{width}")
    return height


def _by_caption(path: Path, captions: Sequence[str], prompts: Sequence[str]) -> dict[int, Tensor]:
    """Row of the prompt table -> its images."""
    rows = {_plain(prompt): row for row, prompt in enumerate(prompts)}
    found: dict[int, list[int]] = {}
    for image, caption in enumerate(captions):
        row = rows.get(_plain(caption))
        if row is None:
            raise DataError(
                f"{path}: caption {caption!r} is none of the recipe's; list it in forget.captions or retain"
            )
        found.setdefault(row, []).append(image)
    return {row: torch.tensor(images) for row, images in found.items()}


def _of_all(count: int, rows: Iterable[int]) -> dict[int, Tensor]:
    return {row: torch.arange(count) for row in rows}


def _only(found: dict[int, Tensor], wanted: set[int], recipe: Recipe) -> dict[int, Tensor]:
    """Of the images those of conditions that the method draws images of. Raises DataError where there are none."""
    kept = {row: images for row, images in found.items() if row in wanted and len(images)}
    if not kept:
        raise DataError(
            f"{recipe.images.source}: none of its images is of what method {recipe.method} learns from: concept or cover, and "
            "what is kept"
        )
    return kept


def _plain(text: str) -> str:
    return clean(text).casefold()
