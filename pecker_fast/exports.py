"""The export of a run, whatever kind of model it is of."""

from pathlib import Path
from typing import Any

from pecker_fast.config import Recipe
from pecker_fast.denoiser import Denoiser
from pecker_fast.export import export_pipeline
from pecker_fast.export_text import export_text_pipeline
from pecker_fast.parts import Parts

GRIDS = ("before", "after", "teacher")


def export_run_folder(
    generator: Denoiser, recipe: Recipe, parts: Parts, run_dir: Path, folder: Path, metrics: dict[str, Any] | None
) -> Path:
    """θ as a diffusers folder with its model card. Raises OutputError, an older folder intact."""
    if parts.text is None:
        return export_pipeline(
            generator, recipe, parts.conditions, folder, base_sha256=parts.teacher_sha256, metrics=metrics
        )
    pictures = {name: run_dir / "samples" / f"{name}.png" for name in GRIDS}
    return export_text_pipeline(
        generator, recipe, parts.text, folder,
        base_sha256=parts.teacher_sha256, metrics=metrics, pictures=pictures if metrics else None,
    )  # fmt: skip
