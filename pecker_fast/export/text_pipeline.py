"""A text-to-image result as a diffusers folder that stock diffusers loads: the base model with θ.

pipeline/  model_index.json  README.md  model.json  samples/
           unet/  θ, every tensor in the dtype of the base's file
           scheduler/  of a one-step generator EulerDiscreteScheduler with trailing spacing, else the base's own
           vae/  text_encoder/  tokenizer/  [text_encoder_2/  tokenizer_2/]  the base's own files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.export.card import Card
from pecker_fast.export.folder import Result, as_stored, seal, sound, unet_config, write_about
from pecker_fast.export.outcome import kind_of
from pecker_fast.loading import TextParts
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe

USAGE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
image = pipe(
    {prompt!r}, num_inference_steps=1, guidance_scale=1.0,
    height={height}, width={width}, generator=torch.Generator().manual_seed(0),
).images[0]
"""

MANY_USAGE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")
image = pipe(
    {prompt!r}, num_inference_steps={steps}, guidance_scale={guidance:g},
    height={height}, width={width}, generator=torch.Generator().manual_seed(0),
).images[0]
"""

JUDGED = "UA: share of forget samples in which the judge does not see the forgotten word."


def export_text_pipeline(result: Result, folder: Path, pictures: Mapping[str, Path]) -> Path:
    """Write the pipeline folder as a whole (an older one is replaced at the end). Raises OutputError, the old one intact.

    pictures: image grids for the card, by name ("before", "after", "teacher").
    """
    text = text_of(result)
    weights = sound(as_stored(result.generator.unet.state_dict(), text.base_unet()), folder)
    with files.whole_folder(folder) as temporary:
        files.write_json(temporary / "unet" / files.CONFIG_NAME, unet_config(result.generator))
        files.write_tensors(temporary / "unet" / files.WEIGHTS_NAME, weights, {"format": "pt", **result.marks()})
        text.write_other_parts(temporary)
        weights_sha256 = files.hash_of(weights)
        write_about(temporary, result, text_facts(result, weights_sha256))
        shown = [name for name, path in pictures.items() if path.is_file()]
        for name in shown:
            files.write_bytes(temporary / "samples" / f"{name}.png", pictures[name].read_bytes())
        files.write_text(temporary / "README.md", text_card(result, weights_sha256, shown))
        seal(temporary, result, weights_sha256)
    return folder


def text_of(result: Result) -> TextParts:
    assert result.model.text is not None
    return result.model.text


def text_card(result: Result, weights_sha256: str, shown: Sequence[str] = ()) -> str:
    """README.md of a text-to-image result. shown: names of the image grids beside it."""
    text, recipe = text_of(result), result.recipe
    card = Card(recipe, result.base_sha256, weights_sha256, result.metrics)
    code = usage(result.generator, recipe, text, "pipeline")
    return card.markdown(
        what_is_forgotten(text), code, JUDGED, "pipeline_tag: text-to-image\n", before_and_after(shown)
    )


def text_facts(result: Result, weights_sha256: str) -> dict[str, Any]:
    """model.json of a text-to-image result."""
    recipe = result.recipe
    return {
        **kind_of(recipe),
        "concepts": [{"concept": concept, "cover": cover} for concept, cover in text_of(result).plan.concepts],
        "base": recipe.model,
        "revision": recipe.revision,
        "base_sha256": result.base_sha256,
        "weights_sha256": weights_sha256,
    }


def usage(generator: Denoiser, recipe: Recipe, text: TextParts, folder: str) -> str:
    """The few lines of the model card that draw with stock diffusers."""
    height, width = text.pixels
    at: dict[str, Any] = {"t_init": recipe.timesteps.init}
    if not recipe.one_step:
        at = {"steps": recipe.evaluate.teacher_steps, "guidance": recipe.guidance.teacher}
    form = USAGE if recipe.one_step else MANY_USAGE
    return form.format(folder=folder, prompt=text.plan.retain[0], height=height, width=width, **at)


def what_is_forgotten(text: TextParts) -> str:
    if text.plan.concepts:
        return ", ".join(f"“{concept}” (“{cover}” is drawn in its place)" for concept, cover in text.plan.concepts)
    return f"what {len(text.plan.forget)} prompts ask for"


def before_and_after(pictures: Sequence[str]) -> str:
    """The card's section of image grids, where there are any."""
    if not pictures:
        return ""
    shown = "\n".join(f"**{name}**\n\n![{name}](samples/{name}.png)\n" for name in pictures)
    return f"""## Before and after

The same noise in every grid. Rows: prompts to forget, their covers, retain prompts that are nearest, other retain prompts.

{shown}

"""
