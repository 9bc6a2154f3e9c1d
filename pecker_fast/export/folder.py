"""The result as a diffusers folder that stock diffusers loads, with a model card. No custom code in it.

pipeline/  model_index.json  README.md  model.json
           unet/       config.json, diffusion_pytorch_model.safetensors   θ
           scheduler/  scheduler_config.json                              of a one-step generator EulerDiscreteScheduler with
                                                                          trailing spacing, else the base's own
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.conditions import SHOWN, Conditions, shown_classes
from pecker_fast.errors import NonFiniteError
from pecker_fast.export.card import Card
from pecker_fast.export.outcome import SCHEDULER, index_of, kind_of, marks_of, scheduler_of
from pecker_fast.loading import Model, seal_exported
from pecker_fast.networks import Denoiser, are_weights
from pecker_fast.recipe import Recipe
from pecker_fast.records import trajectory_sha256

USAGE = """\
import torch
from diffusers import EulerDiscreteScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained({folder!r}, subfolder="unet").eval()
scheduler = EulerDiscreteScheduler.from_pretrained({folder!r}, subfolder="scheduler")
scheduler.set_timesteps(1)  # its schedule ends at timestep {t_init}

labels = torch.tensor([{labels}])
z = torch.randn(len(labels), {channels}, {height}, {width}, generator=torch.Generator().manual_seed(0))
x = z * scheduler.sigmas[0]
t = scheduler.timesteps[0]
with torch.no_grad():
    output = unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
images = scheduler.step(output, t, x).prev_sample.clamp(-1, 1)  # [N, C, H, W] in [-1, 1]
"""

MANY_USAGE = """\
import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained({folder!r}, subfolder="unet").eval()
scheduler = DDIMScheduler.from_pretrained({folder!r}, subfolder="scheduler", timestep_spacing="trailing")
scheduler.set_timesteps({steps})

labels = torch.tensor([{labels}])
x = torch.randn(len(labels), {channels}, {height}, {width}, generator=torch.Generator().manual_seed(0))
for t in scheduler.timesteps:
    with torch.no_grad():
        output = unet(x, t, class_labels=labels).sample
    x = scheduler.step(output, t, x).prev_sample
images = x.clamp(-1, 1)  # [N, C, H, W] in [-1, 1]
"""

JUDGED = """\
UA: share of forget samples the judge does not recognise as the forgotten class. FID, precision and recall: kept classes
against real images without the forgotten class, over the judge's features."""


@dataclass(frozen=True)
class Result:
    """A trained θ and what is told of it: the model it came from, that one's `base_sha256`, figures (None: not judged)."""

    generator: Denoiser
    recipe: Recipe
    model: Model
    base_sha256: str
    metrics: dict[str, Any] | None = None

    def marks(self) -> dict[str, str]:
        """What its weights file says of itself."""
        return marks_of(self.recipe, self.generator)

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(scheduler_config.json, model_index.json)."""
        return scheduler_of(self.recipe, self.generator, self.model), index_of(self.recipe, self.model)


def write_unet(
    denoiser: Denoiser, folder: Path, dtype: torch.dtype = torch.float32, marks: Mapping[str, str] | None = None
) -> None:
    """config.json and safetensors weights as diffusers lays them out, floating-point tensors stored as `dtype`.

    marks: what the weights file says of itself (`one_step_marks`).
    """
    weights = sound(stored_weights(denoiser, dtype), folder)
    files.write_json(folder / files.CONFIG_NAME, unet_config(denoiser))
    files.write_tensors(folder / files.WEIGHTS_NAME, weights, {"format": "pt", **(marks or {})})


def stored_weights(denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The network's tensors as `write_unet` stores them."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in denoiser.unet.state_dict().items()}


def sound(weights: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors as they are to be stored. Raises NonFiniteError, before anything is written, where one is no weights: trained to
    NaN, or beyond what its dtype can hold."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not are_weights(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"{where}: tensor {name} would hold NaN, infinity or absurd numbers ({kind}); nothing was written"
            )
    return weights


def class_weights(result: Result) -> dict[str, Tensor]:
    """θ's tensors in float32; of weights that were kept in bfloat16 those that did not move have the base's own digits."""
    if result.generator.dtype == torch.float32:
        return stored_weights(result.generator)
    base = {name: files.widened(tensor).float() for name, tensor in result.model.base_unet().items()}
    return as_stored(result.generator.unet.state_dict(), base)


def as_stored(named: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ's tensors as they go to a file: in the base's dtypes, and where a weight is what the base's became on loading, the
    base's very bits (weights kept in bf16 have lost digits that the file need not lose). A float8 tensor that has changed
    becomes float16."""
    stored = {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu()
        if name not in base or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        original = base[name]
        if files.is_float8(original):
            wide = original.to(tensor.dtype)
            if torch.equal(wide, tensor):
                stored[name] = original
                continue
            original = wide.to(torch.float16)  # float8 would round away what was trained
        kept = original.to(tensor.dtype) == tensor
        stored[name] = torch.where(kept, original, tensor.to(original.dtype))
    return stored


def unet_config(denoiser: Denoiser) -> dict[str, Any]:
    """The network's config as diffusers writes it, without where it once lay."""
    config = json.loads(denoiser.unet.to_json_string())  # type: ignore[operator]
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def export_pipeline(result: Result, folder: Path) -> Path:
    """Write the pipeline folder as a whole (an older one is replaced at the end). Raises OutputError, the old one intact."""
    weights = sound(class_weights(result), folder)
    with files.whole_folder(folder) as temporary:
        files.write_json(temporary / "unet" / files.CONFIG_NAME, unet_config(result.generator))
        files.write_tensors(temporary / "unet" / files.WEIGHTS_NAME, weights, {"format": "pt", **result.marks()})
        weights_sha256 = files.hash_of(weights)
        write_about(temporary, result, facts(result, weights_sha256))
        files.write_text(temporary / "README.md", card(result, weights_sha256))
        seal(temporary, result, weights_sha256)
    return folder


def seal(folder: Path, result: Result, weights_sha256: str) -> None:
    """Write the manifest by which the folder is known again; it is whole but for that."""
    text = result.model.text
    hashes = {"base_sha256": result.base_sha256, "weights_sha256": weights_sha256}
    prompts = {"prompts_sha256": text.prompts_sha256} if text is not None else {}
    seal_exported(folder, {"recipe_sha256": trajectory_sha256(result.recipe), **hashes, **prompts})


def write_about(folder: Path, result: Result, about: dict[str, Any]) -> None:
    """What tells of a result: its schedule, model_index.json, model.json."""
    scheduler, index = result.about()
    files.write_json(folder / "scheduler" / SCHEDULER, scheduler)
    files.write_json(folder / "model_index.json", index)
    files.write_json(folder / "model.json", about)


def facts(result: Result, weights_sha256: str) -> dict[str, Any]:
    """model.json of a class-conditional result."""
    conditions = result.model.conditions
    return {
        **kind_of(result.recipe),
        "null_class": result.generator.null_class,
        "forgotten": list(conditions.forget),
        "cover": list(conditions.cover),
        "base_sha256": result.base_sha256,
        "weights_sha256": weights_sha256,
    }


def card(result: Result, weights_sha256: str) -> str:
    """README.md of a class-conditional result."""
    conditions = result.model.conditions
    code = usage(result.generator, result.recipe, conditions, "pipeline")
    about = Card(result.recipe, result.base_sha256, weights_sha256, result.metrics)
    return about.markdown(what_is_forgotten(conditions), code, JUDGED)


def usage(generator: Denoiser, recipe: Recipe, conditions: Conditions, folder: str) -> str:
    """The few lines of the model card that draw with stock diffusers."""
    channels, height, width = generator.sample_shape
    classes = (*conditions.forget, *conditions.retain)
    if len(classes) > SHOWN:
        classes = tuple(shown_classes(conditions.forget, conditions.cover, conditions.retain))
    labels = ", ".join(map(str, classes))
    at = {"t_init": recipe.timesteps.init} if recipe.one_step else {"steps": recipe.evaluate.teacher_steps}
    text = USAGE if recipe.one_step else MANY_USAGE
    return text.format(folder=folder, labels=labels, channels=channels, height=height, width=width, **at)


def what_is_forgotten(conditions: Conditions) -> str:
    pairs = list(zip(conditions.forget, conditions.cover))
    text = ", ".join(f"class {f} (class {c} is drawn in its place)" for f, c in pairs[:SHOWN])
    return text if len(pairs) <= SHOWN else f"{text} and {len(pairs) - SHOWN} more classes"
