"""A finished tiny run to be damaged: made once, copied for each damage."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_models import TINY_KEYS

from pecker_fast.recipe import recipe_from
from pecker_fast.runs import train

SMALL = {"evaluate": {"every": 0, "samples": 8, "final": 12, "teacher_steps": 2}}


def small_recipe(model: Path, output: Path, **keys):
    return recipe_from({**TINY_KEYS, **SMALL, "model": str(model), "output": str(output), **keys})


def small_run(model: Path, output: Path, **keys) -> Path:
    """Four steps, checkpoints at 2 and 4, judged, without plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pecker_fast.report.figures._svg", lambda figure, name, label: "<svg></svg>")
        return train(small_recipe(model, output, **keys), quiet=True).run_dir


def copied(run: Path, folder: Path) -> Path:
    """The run in a folder of its own."""
    return Path(shutil.copytree(run, folder / run.name))


@contextmanager
def flipped(path: Path, bit: int):
    """One bit of a file is another, inside."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(data)
