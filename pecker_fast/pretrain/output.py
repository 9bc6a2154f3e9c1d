"""The folder a pretraining run writes: who owns it, what is left of an interrupted run, and its parts on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast import files
from pecker_fast.errors import CheckpointError, OutputError
from pecker_fast.pretrain.rounds import round_folders

PARTIAL = "partial.json"
PARTIAL_TENSORS = "partial.safetensors"
TEACHER = "teacher"
MODEL = "model.json"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, or find that it is empty or holds an interrupted run, and hold it; else raise `OutputError`."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, a folder is needed")
    with files.held(folder):
        if not (folder / PARTIAL).is_file() and not _is_empty(folder):
            what = "already holds a model" if (folder / MODEL).is_file() else "is not empty and not of this command"
            raise OutputError(f"{folder}: {what}; nothing is overwritten, choose another output")
        yield


def claim_for(folder: Path, identity: dict[str, Any], command: str) -> bool:
    """Mark the claimed folder as this run's, and clear away what a killed process has left; raise `OutputError` where it is
    another run's unfinished one. Returns whether the model is whole: that process had come to `finish`."""
    if not (folder / PARTIAL).is_file():
        files.write_json(folder / PARTIAL, identity)
        return False
    found = files.read_json(folder / PARTIAL, error=OutputError)
    if found != identity:
        known = found if isinstance(found, dict) else {}
        changed = [key for key in {**identity, **known} if known.get(key) != identity.get(key)]
        raise OutputError(
            f"{folder}: holds an unfinished run with other {', '.join(changed) or 'contents'}; choose another output"
        )
    with files.output_errors(folder):
        for part in (folder, *(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())):
            files.sweep(part)
    card = files.read_json(folder / MODEL, error=OutputError) if (folder / MODEL).is_file() else {}
    return isinstance(card, dict) and "figures" in card and card.get("command") == command


def _partial(folder: Path, part: str) -> Path:
    """Where the training state of a part of the model lies."""
    return folder / (PARTIAL_TENSORS if part == TEACHER else f"partial-{part}.safetensors")


def save_partial(folder: Path, tensors: dict[str, Tensor], step: int, part: str = TEACHER) -> None:
    """Raises OutputError."""
    path, said = _partial(folder, part), str(step)
    files.write_tensors(path, tensors, {"step": said, "sha256": _seal(tensors, said)})


def _seal(tensors: dict[str, Tensor], step: str) -> str:
    return files.sha256_value([step, files.hash_of(tensors)])


def load_partial(folder: Path, part: str = TEACHER) -> tuple[dict[str, Tensor], int] | None:
    """Training state of an interrupted run, None where there is none. Raises `CheckpointError` where it is damaged."""
    path = _partial(folder, part)
    if not path.is_file():
        return None
    tensors, metadata = files.read_tensors(path, error=CheckpointError)
    if not metadata.get("step", "").isdecimal():
        raise CheckpointError(f"{path}: damaged, the step is missing; delete the file to start over")
    if metadata.keys() != {"step"} and metadata.get("sha256") != _seal(tensors, metadata["step"]):
        raise CheckpointError(
            f"{path}: damaged (its sha256 is not that of what it holds); delete the file to start over"
        )
    return tensors, int(metadata["step"])


def finish(folder: Path) -> None:
    """Remove what an interrupted run would need; the folder is a finished model from here on."""
    with files.output_errors(folder):
        files.sweep(folder)
        parts = (*sorted(folder.glob("partial-*.safetensors")), folder / PARTIAL_TENSORS, *round_folders(folder))
        for path in (*parts, folder / PARTIAL):  # the mark of an unfinished run goes last
            files.remove_tree(path)


def _is_empty(folder: Path) -> bool:
    return all(files.is_left_over(entry) for entry in folder.iterdir())


def write_index(folder: Path) -> None:
    """`model_index.json`, by which diffusers' users know the folder as a pipeline."""
    import diffusers

    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    files.write_json(folder / "model_index.json", index)


def write_scheduler(folder: Path) -> None:
    """`scheduler/`: DDPM's linear schedule (arXiv 2006.11239), 1000 steps, noise prediction."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon"
    )
    with files.whole_folder(folder / "scheduler") as temporary:
        scheduler.save_pretrained(temporary)
