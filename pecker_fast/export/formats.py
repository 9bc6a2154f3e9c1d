"""The export of a run, whatever kind of model it is of, in every format."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pecker_fast import files
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.export.delta import write_delta
from pecker_fast.export.folder import Result, as_stored, card, export_pipeline, facts, sound
from pecker_fast.export.lora_file import are_products, write_adapters, write_lora
from pecker_fast.export.outcome import scheduler_of
from pecker_fast.export.text_pipeline import export_text_pipeline, text_card, text_facts
from pecker_fast.networks import AdaptedUNet
from pecker_fast.networks.single_file import replace_unet, to_single_file

GRIDS = ("before", "after", "teacher")
FORMATS = ("diffusers", "unet", "single", "delta", "lora")


def export_folder(result: Result, run_dir: Path, folder: Path) -> Path:
    """θ as a diffusers folder with its model card. Raises OutputError, an older folder intact."""
    if result.model.text is None:
        return export_pipeline(result, folder)
    pictures = {name: run_dir / "samples" / f"{name}.png" for name in GRIDS} if result.metrics else {}
    return export_text_pipeline(result, folder, pictures)


@dataclass(frozen=True)
class LoraForm:
    """What a LoRA file is to be: see `write_lora`."""

    rank: int = 32
    names: str = "diffusers"


def export_file(
    result: Result,
    output: Path,
    form: str,
    lora: LoraForm = LoraForm(),
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """θ as one safetensors file, every tensor in the dtype of the base's. say: gets a line on what a LoRA does not hold.

    form: "unet" (the UNet alone, diffusers' names), "single" (a whole checkpoint in the original Stable Diffusion layout), "lora"
    (products of low rank beside the base's layers) or "delta" (only the weights that changed, with model.json and card in its
    notes, of a one-step generator its schedule too). Each tells in its metadata what it is (`marks_of`).
    Raises RecipeError, OutputError.
    """
    model = result.model
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: the format {form} is one file; give a name that ends in .safetensors")
    if output.exists():
        raise OutputError(f"{output}: exists already; give another name")
    base, adapted = model.base_unet(), result.generator.unet
    result = replace(result, generator=result.generator.without_adapters())
    unet = sound(as_stored(result.generator.unet.state_dict(), base), output)
    marks = result.marks()
    if form == "lora":
        if model.text is None:
            raise RecipeError("format: lora is for models that draw from text; of this one export delta or unet")
        told = {**marks, "base_sha256": files.hash_of(base)}
        plain = result.generator.unet
        if isinstance(adapted, AdaptedUNet) and result.recipe.generator is None and are_products(adapted, lora.rank):
            stats = write_adapters(adapted, output, names=lora.names, metadata=told)
        else:
            stats = write_lora(plain, base, unet, output, rank=lora.rank, names=lora.names, metadata=told)
        say(
            f"{stats.layers} layers of rank up to {stats.rank}; {100 * stats.error:.3g} % of the change is not in it"
            + (f", {100 * stats.unheld:.3g} % of biases and norms" if stats.unheld else "")
        )
        return output
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
        about, readme = facts(result, weights_sha256), card(result, weights_sha256)
    else:
        about, readme = text_facts(result, weights_sha256), text_card(result, weights_sha256)
    one_step = {}
    if result.recipe.one_step:  # else the base's own schedule stays
        scheduler = scheduler_of(result.recipe, result.generator, result.model)
        one_step = {"t_init": str(result.recipe.timesteps.init), "scheduler": json.dumps(scheduler)}
    return {
        **one_step,
        "model": json.dumps(about),
        "card": readme,
        **result.marks(),
    }
