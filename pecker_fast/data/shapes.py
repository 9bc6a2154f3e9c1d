"""Drawn shapes and the captions that name them: the images and texts of the small text-to-image model.

A picture shows one shape in one colour, on one background, at one position; size, tilt, place and shades vary. What a
picture shows is a row of word indices `[4]`, in the order of `ATTRIBUTES`. No word belongs to two attributes, so a word
in a caption names its attribute too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.errors import DataError

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross"),
    "colour": ("red", "green", "blue", "yellow", "purple"),
    "background": ("black", "white", "gray"),
    "position": ("left", "right", "top", "bottom", "center"),
}
COLOURS = ((0.86, 0.16, 0.16), (0.16, 0.70, 0.24), (0.18, 0.30, 0.90), (0.95, 0.82, 0.16), (0.60, 0.20, 0.76))
BACKGROUNDS = ((0.06, 0.06, 0.06), (0.94, 0.94, 0.94), (0.50, 0.50, 0.50))
POSITIONS = (
    (-0.48, 0.0),
    (0.48, 0.0),
    (0.0, -0.48),
    (0.0, 0.48),
    (0.0, 0.0),
)  # of the middle of the shape; x right, y down

FULL_TEMPLATES = (
    "a {colour} {shape} on a {background} background, {position}",
    "a photo of a {colour} {shape} at the {position}, {background} background",
    "{position}: {colour} {shape} on {background}",
    "a picture with a {colour} {shape} in the {position} against {background}",
    "{background} background with a {colour} {shape} at the {position}",
    "there is a {colour} {shape} on the {position} of a {background} image",
    "the {shape} is {colour}, the background is {background}, it sits {position}",
    "{colour} {shape}, {background} background, {position}",
    "on {background}, {position}, a {colour} {shape}",
    "an image of one {shape}, {colour}, {position}, in front of {background}",
    "a {shape} painted {colour} in the {position} of a {background} canvas",
    "a drawing of a {colour} {shape} placed {position} over {background}",
)
SHORT_TEMPLATES = (
    "a {colour} {shape}",
    "a {shape} in {colour}",
    "a {colour} {shape} on a {background} background",
    "a photo of a {colour} {shape} at the {position}",
)
TEMPLATES = FULL_TEMPLATES + SHORT_TEMPLATES

SUPERSAMPLE = 4
RADIUS = (0.36, 0.46)  # of the circle around the shape, in half image widths
PLACE_JITTER = 0.06  # in half image widths
TILT = 0.15  # radians
SHADE_JITTER = 0.04
HELD_OUT_CELLS = 4  # of the 15 (background, position) pairs of each coloured shape


def combinations() -> Tensor:
    """All that a picture can show: int64 `[375, 4]`, the last attribute fastest."""
    return torch.tensor(list(itertools.product(*(range(len(words)) for words in ATTRIBUTES.values()))))


def caption(words: Tensor | list[int], template: int) -> str:
    """The caption of word indices `[4]` by one of `TEMPLATES`; the short ones leave out position or background."""
    named = {key: names[int(index)] for (key, names), index in zip(ATTRIBUTES.items(), words)}
    return TEMPLATES[template].format(**named)


def held_out(words: Tensor) -> Tensor:
    """Which rows of word indices `[n, 4]` no training caption names: bool `[n]`, about a quarter of `combinations()`.

    Each coloured shape loses as many, spread evenly over positions and backgrounds.
    """
    shape, colour, background, position = words.unbind(1)
    cells = [
        ((position - shape - 2 * colour - i) % 5 == 0) & ((background - shape - colour - i) % 3 == 0)
        for i in range(HELD_OUT_CELLS)
    ]
    return torch.stack(cells).any(0)


def captions(split: str) -> list[str]:
    """Captions, each once, that name every shape and every colour equally often.

    "train": 600, two full templates for every combination that is not held out and two short ones for every coloured
    shape. "held_out": 1200, every full template for every held-out combination. Raises `DataError` for other splits.
    """
    every = combinations()
    out = held_out(every)
    if split == "held_out":
        return [caption(words, i) for words in every[out].tolist() for i in range(len(FULL_TEMPLATES))]
    if split != "train":
        raise DataError(f"unknown split {split!r} of captions; choose train or held_out")
    full, short = len(FULL_TEMPLATES), len(SHORT_TEMPLATES)
    found = [caption(words, (2 * row + i) % full) for row, words in enumerate(every[~out].tolist()) for i in range(2)]
    pairs = enumerate(itertools.product(range(len(ATTRIBUTES["shape"])), range(len(ATTRIBUTES["colour"]))))
    for row, (shape, colour) in pairs:
        words = [shape, colour, row % len(BACKGROUNDS), row % len(POSITIONS)]
        found += [caption(words, full + (row + i) % short) for i in (0, 2)]
    return found


def random_words(n: int, seed: int, stream: str = "shapes-words") -> Tensor:
    """Word indices `[n, 4]` of n pictures: every attribute uniform and independent."""
    g = draws.generator(seed, stream)
    return torch.stack([torch.randint(len(words), (n,), generator=g) for words in ATTRIBUTES.values()], 1)


def render(words: Tensor, index: Tensor, seed: int = 0, size: int = 32, batch: int = 256) -> Tensor:
    """Antialiased pictures float32 `[n, 3, size, size]` in [-1, 1] of word indices `[n, 4]`.

    index: int64 `[n]`, which picture of these words: each is a function of (its words, its index, seed) alone, whatever
    else is drawn with it. batch: pictures drawn at a time.
    """
    parts = [_render(w, i, seed, size) for w, i in zip(words.split(batch), index.split(batch)) if len(i)]
    return torch.cat([torch.empty(0, 3, size, size), *parts])


def _render(words: Tensor, index: Tensor, seed: int, size: int) -> Tensor:
    u = torch.stack([torch.rand(8, generator=draws.generator(seed, "shapes", i)) for i in index.tolist()])
    signed = 2 * u - 1
    shape, colour, background, position = words.unbind(1)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * u[:, 0]
    middle = torch.tensor(POSITIONS)[position] + PLACE_JITTER * signed[:, 1:3]
    tilt = (TILT * signed[:, 3]).view(-1, 1, 1)

    fine = size * SUPERSAMPLE
    axis = (torch.arange(fine) + 0.5) * (2 / fine) - 1
    x = (axis.view(1, 1, -1) - middle[:, 0].view(-1, 1, 1)) / radius.view(-1, 1, 1)
    y = (axis.view(1, -1, 1) - middle[:, 1].view(-1, 1, 1)) / radius.view(-1, 1, 1)
    x, y = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    inside = torch.zeros(len(words), fine, fine, dtype=torch.bool)
    for i, outline in enumerate(OUTLINES):
        mine = (shape == i).nonzero().flatten()
        if len(mine):
            inside[mine] = outline(x[mine], y[mine])
    cover = torch.nn.functional.avg_pool2d(inside[:, None].float(), SUPERSAMPLE)

    ink = (torch.tensor(COLOURS)[colour] + SHADE_JITTER * signed[:, 4:7]).clamp(0, 1).view(-1, 3, 1, 1)
    paper = (torch.tensor(BACKGROUNDS)[background] + SHADE_JITTER * signed[:, 7:8]).clamp(0, 1).view(-1, 3, 1, 1)
    return 2 * (paper + cover * (ink - paper)) - 1


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return x * x + y * y <= 0.85


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) <= 0.76


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return (y <= 0.75) & (2 * x.abs() - y <= 1)


def _star(x: Tensor, y: Tensor, inner: float = 0.45) -> Tensor:
    """Five points up; the plane is folded into one half of one point, where the outline is a straight line."""
    half = math.pi / 5
    angle = (torch.atan2(x, -y) % (2 * half) - half).abs()  # half at the tip's axis, 0 in the notch
    r = torch.sqrt(x * x + y * y)
    along, across = r * (half - angle).cos(), r * (half - angle).sin()
    tip, notch = (1.1, 0.0), (inner * 1.1 * math.cos(half), inner * 1.1 * math.sin(half))
    return (notch[0] - tip[0]) * (across - tip[1]) - (notch[1] - tip[1]) * (along - tip[0]) >= 0


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return (long <= 0.95) & (short <= 0.3)


OUTLINES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_circle, _square, _triangle, _star, _cross)
