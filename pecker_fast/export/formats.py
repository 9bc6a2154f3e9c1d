"""The export of a run, whatever kind of model it is of, in every format."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pecker_fast import files
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.export.delta import hash_of, write_delta
from pecker_fast.export.folder import export_pipeline
from pecker_fast.export.text_pipeline import as_stored, export_text_pipeline, one_step_scheduler
from pecker_fast.loading import Model
from pecker_fast.networks import Denoiser, one_step_marks
from pecker_fast.networks.single_file import replace_unet, to_single_file
from pecker_fast.recipe import Recipe

GRIDS = ("before", "after", "teacher")
FORMATS = ("diffusers", "unet", "single", "delta")


def export_folder(
    generator: Denoiser,
    recipe: Recipe,
    model: Model,
    run_dir: Path,
    folder: Path,
    metrics: dict[str, Any] | None,
    base_sha256: str,
) -> Path:
    """θ as a diffusers folder with its model card. Raises OutputError, an older folder intact."""
    if model.text is None:
        return export_pipeline(generator, recipe, model.conditions, folder, base_sha256=base_sha256, metrics=metrics)
    pictures = {name: run_dir / "samples" / f"{name}.png" for name in GRIDS}
    return export_text_pipeline(
        generator, recipe, model.text, folder,
        base_sha256=base_sha256, metrics=metrics, pictures=pictures if metrics else None,
    )  # fmt: skip


def base_unet(model: Model) -> dict[str, Tensor]:
    """The UNet's tensors as the base's file has them."""
    if model.text is not None:
        return model.text.base_unet()
    return files.read_weights(files.check_model_folder(model.folder))


def export_file(generator: Denoiser, model: Model, output: Path, form: str, t_init: int) -> Path:
    """θ as one safetensors file, every tensor in the dtype of the base's.

    form: "unet" (the UNet alone, diffusers' names), "single" (a whole checkpoint in the original Stable Diffusion layout) or
    "delta" (only the weights that changed). t_init: where the generator takes its one step. Each tells it in its metadata,
    with the prediction type and that it is a one-step generator (`one_step_marks`).
    Raises RecipeError, OutputError.
    """
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: the format {form} is one file; give a name that ends in .safetensors")
    if output.exists():
        raise OutputError(f"{output}: exists already; give another name")
    base = base_unet(model)
    unet = as_stored(generator.unet.state_dict(), base)
    marks = one_step_marks(generator.schedule, t_init)
    if form == "unet":
        files.write_tensors(output, unet, {"format": "pt", **marks})
    elif form == "delta":
        facts = {"t_init": str(t_init), "scheduler": json.dumps(one_step_scheduler(generator)), **marks}
        write_delta(base, unet, output, base_sha256=hash_of(base), metadata=facts)
    elif model.text is None:
        raise RecipeError("format: single is the layout of Stable Diffusion checkpoints; this model draws from classes")
    elif model.text.single:
        replace_unet(model.text.source, output, unet, marks=marks)
    else:
        to_single_file(model.text.source, output, unet=unet, marks=marks)
    return output
