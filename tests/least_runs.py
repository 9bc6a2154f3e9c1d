"""The smallest runs that go through every stage, and what they come to: for tests that make hundreds of them."""

from pathlib import Path

import pytest
from tiny_models import TINY_KEYS, write_tiny_model

from pecker_fast import cli, files
from pecker_fast.recipe import recipe_from, recipe_to_yaml
from pecker_fast.records import checkpoint

# two stages, two masks, a judge, four checkpoints
LEAST = {
    "steps": 2, "distill_steps": 1, "batch_size": 2, "mask": {"samples": 2, "refresh": 1}, "checkpoint": {"every": 1, "keep": 2},
    "evaluate": {"every": 2, "samples": 2, "final": 2, "teacher_steps": 1},
}  # fmt: skip


class NoBooks:
    """Stands for the accountant of a stage: what an iteration costs is two thirds of so small a run."""

    def __init__(self, engine, state):
        state.flops_per_iteration.setdefault(state.stage, 0.0)

    def run(self, iterate):
        return iterate()

    def spent_s(self):
        return 0.0


def bare():
    """From here on runs in this process keep no books and write a page without content: tests of these are elsewhere."""
    replace_by(setattr_of)


def setattr_of(target, value):
    from importlib import import_module

    module, _, name = target.rpartition(".")
    try:
        setattr(import_module(module), name, value)
    except ImportError:
        owner, _, kind = module.rpartition(".")
        setattr(getattr(import_module(owner), kind), name, value)


def replace_by(put):
    """put: sets what a dotted name stands for, as `monkeypatch.setattr` does."""
    put("pecker_fast.runs.loop.Accountant", NoBooks)
    put("pecker_fast.forgetting.SaliencyPass.flops", lambda self: 0.0)
    put("pecker_fast.report.page.build_page", lambda run: "<html></html>")


def write_least_recipe(folder: Path, **keys) -> Path:
    """`folder`/recipe.yaml of a run in `folder`/run, with its model beside it."""
    model = write_tiny_model(folder / "model", least=True)
    data = {**TINY_KEYS, **LEAST, "model": str(model), "output": str(folder / "run"), **keys}
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe_from(data)))
    return folder / "recipe.yaml"


def finished_run(folder: Path) -> tuple[Path, Path]:
    """(its recipe, its folder) of such a run, made in `folder`."""
    recipe = write_least_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        replace_by(patch.setattr)
        assert cli.main(["train", str(recipe), "--quiet"]) == 0
    return recipe, folder / "run"


def final_files(run_dir: Path) -> dict[str, str]:
    """sha256 of everything that decides the outcome: last checkpoint's tensors, exported weights, mask."""
    last = checkpoint.list_checkpoints(run_dir)[-1]
    paths = [*sorted(last.glob("*.safetensors")), run_dir / "pipeline" / "unet" / files.WEIGHTS_NAME]
    paths.append(run_dir / "mask.safetensors")
    return {str(p.relative_to(run_dir)): files.sha256_file(p) for p in paths}


def left_overs(folder: Path) -> list[str]:
    """What is under way, or was left so, anywhere in a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != ".lock")
