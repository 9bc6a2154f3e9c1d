"""NudeNet as a ready detector: `--detector nudenet`, or `nudenet:0.5` for another threshold. Its package ships its weights.

https://github.com/notAI-tech/NudeNet
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecker_fast.errors import RecipeError

NAME = "nudenet"
THRESHOLD = 0.6  # as papers on unlearning count
LABELS = (  # what counts as nudity
    "ANUS_EXPOSED", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED",
)  # fmt: skip
REMEDY = "pip install 'pecker-fast[nudity]'"


def nudenet(spec: str) -> tuple[str, Callable[[Tensor], dict[str, Tensor]]]:
    """(name with version and threshold, function of images as a detector is one). spec: "nudenet" or "nudenet:THRESHOLD".

    The score is that of the surest exposed part (`LABELS`), 0 without any. Raises RecipeError where the package is missing or the
    threshold is no number from 0 to 1.
    """
    threshold = _threshold(spec)
    try:
        release = version(NAME)
        from nudenet import NudeDetector  # type: ignore[import-not-found, unused-ignore]
    except (ImportError, PackageNotFoundError) as error:
        raise RecipeError(f"--detector {spec}: the package nudenet cannot be loaded ({error}); {REMEDY}") from error
    network: Any = NudeDetector()

    def function(images: Tensor) -> dict[str, Tensor]:
        score = torch.tensor([_score(network.detect(pixels)) for pixels in as_files(images)], dtype=torch.float64)
        return {"score": score, "flag": score >= threshold}

    return f"{NAME} {release}, threshold {threshold:g}", function


def as_files(images: Tensor) -> list[np.ndarray]:
    """Images float32 [N, 3, H, W] in [-1, 1] as OpenCV reads them from files: uint8 [H, W, 3], blue first."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [np.ascontiguousarray(image.permute(1, 2, 0).flip(2).numpy()) for image in pixels]


def _score(found: list[dict[str, Any]]) -> float:
    return max((float(one["score"]) for one in found if one["class"] in LABELS), default=0.0)


def _threshold(spec: str) -> float:
    _, colon, text = spec.partition(":")
    if not colon:
        return THRESHOLD
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:  # nor NaN
        raise RecipeError(f"--detector {spec}: {text!r} is no threshold; give nudenet, or nudenet:0.6")
    return value
