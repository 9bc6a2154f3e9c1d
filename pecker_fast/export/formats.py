"""The export of a run, whatever kind of model it is of, in every format."""

import json
from pathlib import Path

from pecker_fast import files
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.export.delta import write_delta
from pecker_fast.export.folder import Result, as_stored, card, export_pipeline, facts, scheduler_config, sound
from pecker_fast.export.text_pipeline import (
    export_text_pipeline,
    one_step_scheduler,
    text_card,
    text_facts,
)
from pecker_fast.networks.single_file import replace_unet, to_single_file

GRIDS = ("before", "after", "teacher")
FORMATS = ("diffusers", "unet", "single", "delta")


def export_folder(result: Result, run_dir: Path, folder: Path) -> Path:
    """θ as a diffusers folder with its model card. Raises OutputError, an older folder intact."""
    if result.model.text is None:
        return export_pipeline(result, folder)
    pictures = {name: run_dir / "samples" / f"{name}.png" for name in GRIDS} if result.metrics else {}
    return export_text_pipeline(result, folder, pictures)


def export_file(result: Result, output: Path, form: str) -> Path:
    """θ as one safetensors file, every tensor in the dtype of the base's.

    form: "unet" (the UNet alone, diffusers' names), "single" (a whole checkpoint in the original Stable Diffusion layout) or
    "delta" (only the weights that changed, with the result's schedule, model.json and card in its notes). Each tells in its
    metadata where the generator takes its one step, its prediction type and that it is one (`one_step_marks`).
    Raises RecipeError, OutputError.
    """
    model = result.model
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: the format {form} is one file; give a name that ends in .safetensors")
    if output.exists():
        raise OutputError(f"{output}: exists already; give another name")
    base = model.base_unet()
    unet = sound(as_stored(result.generator.unet.state_dict(), base), output)
    marks = result.marks()
    if form == "unet":
        files.write_tensors(output, unet, {"format": "pt", **marks})
    elif form == "delta":
        write_delta(base, unet, output, base_sha256=files.hash_of(base), metadata=_notes(result, files.hash_of(unet)))
    elif model.text is None:
        raise RecipeError("format: single is the layout of Stable Diffusion checkpoints; this model draws from classes")
    elif model.text.single:
        replace_unet(model.text.source, output, unet, marks=marks)
    else:
        to_single_file(model.text.source, output, unet=unet, marks=marks)
    return output


def _notes(result: Result, weights_sha256: str) -> dict[str, str]:
    """What `export apply` writes beside the weights: as the run's own pipeline has it."""
    if result.model.text is None:
        about, scheduler = facts(result, weights_sha256), scheduler_config(result.generator)
        readme = card(result, weights_sha256)
    else:
        about, scheduler = text_facts(result, weights_sha256), one_step_scheduler(result.generator)
        readme = text_card(result, weights_sha256)
    return {
        "t_init": str(result.recipe.timesteps.init),
        "scheduler": json.dumps(scheduler),
        "model": json.dumps(about),
        "card": readme,
        **result.marks(),
    }
