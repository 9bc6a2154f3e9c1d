"""A one-step generator beside the teacher, distilled in rounds: each goes on from the one before and is done once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pecker_fast import files

PARTS = ("generator", "score")


def distil(
    folder: Path, rounds: Sequence[Mapping[str, Any]], steps: int, seed: int, dtype: torch.dtype,
    without: Sequence[int | str] = (),
) -> None:  # fmt: skip
    """Put `generator/` and `score/` beside the teacher in `folder`.

    without: classes, or words of captions, that no round draws under.
    rounds: recipe keys of each, with its `share` of the steps (none: all of them). What a round has made stays in a folder of its
    own, `round_folders`, until the model is whole: an interrupted one is taken up, and starts from what it started from.
    """
    from pecker_fast.runs import distill

    before: Path | None = None
    for number, given in enumerate(rounds):
        into = folder / f".distilled-{number + 1}"
        if not into.is_dir():
            keys = {key: value for key, value in given.items() if key != "share"}
            keys |= {"generator": str(before)} if before is not None else {}
            share = max(1, round(given.get("share", 1) * steps))
            distill(folder, into=into, steps=share, seed=seed + number, keys=keys, dtype=dtype, without=without)
        before = into
    assert before is not None, "no rounds"
    with files.output_errors(folder):
        for part in PARTS:
            if (before / part).is_dir():  # else an interrupted process has put it in its place already
                files.replace_folder(before / part, folder / part)


def round_folders(folder: Path) -> list[Path]:
    """What is left of the rounds beside a whole model."""
    return sorted(folder.glob(".distilled-*"))
