"""Shared fixtures: a tiny class-conditional model folder with a judge, random weights, that trains in milliseconds."""

from pathlib import Path

import pytest
from tiny_models import write_tiny_model

TINY_KEYS = {
    "forget": 0,
    "cover": 1,
    "steps": 4,
    "batch_size": 4,
    "mask": {"samples": 8, "density": 0.3},
    "evaluate": {"every": 2, "samples": 8, "final": 12, "teacher_steps": 2},
    "checkpoint": {"every": 2, "keep": 2},
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_recipe(tiny_model, tmp_path):
    """make(**keys) -> a Recipe over the tiny model with a fresh output folder; sections are merged."""
    from pecker_fast.config import recipe_from

    def make(**keys):
        data = {**TINY_KEYS, "model": str(tiny_model), "output": str(tmp_path / "run")}
        for key, value in keys.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
        return recipe_from(data)

    return make
