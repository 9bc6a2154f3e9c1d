"""The second judge: another architecture and another seed, to tell an attack on the judge from one on the model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pecker_fast.evaluate.judge import Judge, load_judge
from pecker_fast.evaluate.words import WordJudge, load_word_judge

SECOND = "second_judge"


def load_second_judge(folder: str | Path) -> Judge | WordJudge | None:
    """The second judge of a model folder, of classes or of words; None where it has none. Raises ModelError."""
    found = Path(folder) / SECOND
    if not found.is_dir():
        return None
    return load_word_judge(found) or load_judge(found)[0]


def disagreement(first: Judge | WordJudge, second: Judge | WordJudge, images: Tensor) -> dict[str, float]:
    """Share of images `[N, C, H, W]` in [-1, 1] that the two call by different names: of each attribute, or of "class".

    Both judge the same classes, or the same words.
    """
    a, b = (_seen(judge, images) for judge in (first, second))
    return {name: sum(x != y for x, y in zip(a[name], b[name])) / max(1, len(images)) for name in a}


def _seen(judge: Judge | WordJudge, images: Tensor) -> dict[str, list[str]]:
    if isinstance(judge, WordJudge):
        return judge.seen(images)
    return {"class": [str(c) for c in judge.judge(images)[1].argmax(1).tolist()]}
