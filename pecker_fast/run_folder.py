"""The run folder: whose it is, where it stopped, and what of it is left standing when it starts over."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pecker_fast import io_safe
from pecker_fast.checkpoint import latest_checkpoint, list_checkpoints, verify_checkpoint
from pecker_fast.config import Recipe, load_recipe, recipe_to_dict, recipe_to_yaml
from pecker_fast.errors import CheckpointError, OutputError

RECIPE, METRICS, MASK, REPORT, PIPELINE = "recipe.yaml", "metrics.json", "mask.safetensors", "report.html", "pipeline"
OWN = (RECIPE, METRICS, MASK, REPORT, PIPELINE, "run.jsonl", "checkpoints", "samples", "tensorboard", "mask.png")
BASE = "base"  # a model given as an object is written here first; it is not wiped when a run starts over


def trajectory(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide every iteration: a run may be resumed with another length, evaluation or checkpoint rhythm."""
    data = recipe_to_dict(recipe)
    for key in ("steps", "checkpoint", "output", "resume"):
        del data[key]
    data["evaluate"] = {"teacher_steps": recipe.evaluate.teacher_steps}  # the saliency pass may draw with the teacher
    del data["engine"]["stall_s"]
    return data


def trajectory_sha256(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(trajectory(recipe), sort_keys=True).encode()).hexdigest()


def open_run_folder(recipe: Recipe) -> Path | None:
    """Make `output` ready and return the checkpoint to resume from (None: from the start), or raise with nothing touched.

    Raises OutputError for a folder of another run or of something else, CheckpointError when there is nothing to resume.
    """
    run_dir = Path(recipe.output)
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputError(f"{run_dir}: is a file; give another output")
    names = {p.name for p in run_dir.iterdir()} - {BASE} if run_dir.is_dir() else set()
    if names and RECIPE not in names:
        raise OutputError(f"{run_dir}: is not empty and not a run folder; give another output")
    explicit = recipe.resume not in ("auto", "never")
    checkpoint = _explicit_checkpoint(Path(recipe.resume)) if explicit else None
    if names and recipe.resume == "auto":
        _same_recipe(recipe, run_dir)
        checkpoint = latest_checkpoint(run_dir, warn=_warn)
    if checkpoint is None or (explicit and run_dir.resolve() not in checkpoint.resolve().parents):
        _wipe(run_dir)
    with io_safe.output_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        io_safe.write_text(run_dir / RECIPE, recipe_to_yaml(recipe))
    return checkpoint


def _explicit_checkpoint(path: Path) -> Path:
    """`resume=PATH`: a checkpoint folder, or a run folder whose newest whole checkpoint is meant."""
    if (path / "manifest.json").is_file():
        verify_checkpoint(path)
        return path
    found = latest_checkpoint(path, warn=_warn) if path.is_dir() and list_checkpoints(path) else None
    if found is None:
        raise CheckpointError(
            f"resume: there is no checkpoint at {path}; give a checkpoints/step-… folder, or resume=never"
        )
    return found


def _same_recipe(recipe: Recipe, run_dir: Path) -> None:
    there = load_recipe(run_dir / RECIPE)
    mine, theirs = _flat(trajectory(recipe)), _flat(trajectory(there))
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise OutputError(
                f"{run_dir}: holds another run ({key} is {theirs.get(key)} there, {value} here); "
                "give another output, or resume=never to start over in it"
            )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _wipe(run_dir: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    with io_safe.output_errors(run_dir):
        for name in OWN:
            path = run_dir / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.exists() or path.is_symlink():
                path.unlink()


def _warn(message: str) -> None:
    import sys

    print(f"warning: {message}", file=sys.stderr)
