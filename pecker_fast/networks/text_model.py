"""Loads a Stable Diffusion 1.x, 2.x or XL model: prompts become a text table, the text encoders leave memory again.

MODEL/  model_index.json  unet/  vae/  scheduler/  tokenizer/  text_encoder/  [tokenizer_2/  text_encoder_2/]
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.networks.architectures import TOKENS
from pecker_fast.networks.denoiser import load_module, load_unet
from pecker_fast.networks.kinds import check_text_unet, other_channels, other_pipeline
from pecker_fast.networks.latents import check_vae
from pecker_fast.networks.marks import check_said, refuse_one_step
from pecker_fast.networks.prompt_window import PromptWindow
from pecker_fast.networks.quiet import quiet_libraries
from pecker_fast.networks.schedule import Schedule, load_schedule
from pecker_fast.networks.single_file import load_text_encoder
from pecker_fast.networks.text_denoiser import TextDenoiser, TextTable
from pecker_fast.networks.tokenizer import check_tokens, load_tokenizer

ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
ENCODED = 32  # prompts a text encoder reads at a time


@dataclass(frozen=True)
class Networks:
    """UNet and VAE of a model with their schedule, wherever they were loaded from."""

    unet: nn.Module
    vae: nn.Module
    schedule: Schedule


def is_text_model(folder: Path) -> bool:
    """Whether a model folder holds a text-to-image model this engine knows. Raises ModelError for other architectures."""
    index = folder / "model_index.json"
    if not index.is_file():
        _check_lone_unet(folder)
        return False
    found = files.read_config(index, "model_index.json")
    name = found.get("_class_name")
    if isinstance(name, str) and name in ENCODERS:
        return True
    if "text_encoder" in found or "transformer" in found or "prior" in found:
        raise ModelError(
            f"{index}: {name} is not supported yet{other_pipeline(name)}; text-to-image models are those of "
            f"{' and '.join(ENCODERS)} (Stable Diffusion 1.x, 2.x and XL)"
        )
    return False


def _check_lone_unet(folder: Path) -> None:
    """Raise ModelError for a text-to-image UNet without the model it belongs to."""
    unet = files.unet_folder(folder)
    if not (unet / files.CONFIG_NAME).is_file():
        return
    config = files.read_json(unet / files.CONFIG_NAME, error=ModelError)
    if isinstance(config, dict) and config.get("_class_name") == "UNet2DConditionModel":
        what = other_channels(config.get("in_channels"))
        raise ModelError(
            f"{folder}: a UNet2DConditionModel without a text-to-image model_index.json"
            f"{f': {what}, which is not supported yet' if what else '; fetch the whole model'}"
        )


def check_text_folder(folder: Path) -> str:
    """Name of the pipeline class of a text-to-image folder. Raises ModelError naming the component that is missing or
    damaged; opens no weights."""
    pipeline: str = files.read_json(folder / "model_index.json", error=ModelError)["_class_name"]
    encoders = ENCODERS[pipeline]
    tokenizers = tuple(name.replace("text_encoder", "tokenizer") for name in encoders)
    files.check_parts(folder, files.PARTS)
    index = files.read_index(folder)
    wanted = {"unet": files.CONFIG_NAME, "vae": files.CONFIG_NAME, "scheduler": "scheduler_config.json"}
    wanted |= dict.fromkeys(encoders, files.CONFIG_NAME)
    for part, file in wanted.items():
        if index.get(part) == [None, None]:
            raise ModelError(f"{folder}: model_index.json has no {part} ([null, null]); a {pipeline} needs it")
        if not (folder / part / file).is_file():
            raise ModelError(f"{folder}: the component {part}/ is missing or has no {file}; a {pipeline} needs it")
    for part in tokenizers:
        if not any((folder / part / file).is_file() for file in ("vocab.json", "tokenizer.json")):
            raise ModelError(f"{folder}: the component {part}/ is missing or has no vocab.json; a {pipeline} needs it")
    _check_components(folder, pipeline)
    return pipeline


def check_source(source: Path, configs: Path, result: bool = False) -> None:
    """Raise ModelError where a text-to-image model, a folder or a single file with the folder of its configs, is no teacher or
    none that is followed, as far as configs and the heads of weight files tell.

    result: a one-step generator is wanted, to be drawn from.
    """
    if source.is_file():
        files.check_tensors(source, error=ModelError)
    if not result:
        refuse_one_step(source)
    pipeline = check_text_folder(configs)
    check_said(source, schedule_of(configs, pipeline), configs / "scheduler")


def _check_components(folder: Path, pipeline: str) -> None:
    """Raise ModelError where index or configs name components of another kind than those that are followed."""
    index = files.read_json(folder / "model_index.json", error=ModelError)
    for part, wanted in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")):
        entry = index.get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name is not None and not (isinstance(name, str) and name.startswith(wanted)):
            raise ModelError(f"{folder / 'model_index.json'}: {part} is a {str(name)[:80]}; only {wanted} is supported")
    unet = files.read_config(folder / "unet" / files.CONFIG_NAME, "UNet2DConditionModel")
    vae = files.read_config(folder / "vae" / files.CONFIG_NAME, "AutoencoderKL")
    check_vae(vae, pipeline, folder / "vae" / files.CONFIG_NAME)
    check_text_unet(unet, vae.get("latent_channels", 4), folder / "unet" / files.CONFIG_NAME)
    for encoder in ENCODERS[pipeline]:
        files.read_config(folder / encoder / files.CONFIG_NAME, "text encoder")
    schedule_of(folder, pipeline)


def schedule_of(folder: Path, pipeline: str) -> Schedule:
    """The schedule of a text-to-image folder. Raises ModelError."""
    schedule = load_schedule(folder / "scheduler")
    kinds = ("epsilon", "v_prediction")
    if schedule.prediction_type not in kinds:
        raise ModelError(
            f"{folder / 'scheduler'}: prediction_type {schedule.prediction_type!r}: expected {' or '.join(kinds)}"
        )
    if pipeline == "StableDiffusionPipeline":  # which turns it off, whatever the config says
        return replace(schedule, clipping={**schedule.clipping, "clip_sample": False})
    return schedule


def encode_prompts(
    folder: Path,
    prompts: Sequence[str],
    null: str,
    size: tuple[int, int],
    encoders: Mapping[str, nn.Module] | None = None,
) -> TextTable:
    """The table of `prompts`, float32 on the CPU. Loads the text encoders and lets them go.

    null: the unconditional text; where the pipeline wants zeros in its place (SDXL, empty text), its row is zeros.
    size: (height, width) in pixels, for SDXL's size conditions. encoders: of a single file, by part; None = the folder's own.
    Raises ModelError.
    """
    with quiet_libraries(), files.guarded(folder, "its text encoders cannot read the prompts"):
        return _encode(folder, prompts, null, size, encoders)


def prompt_window(folder: Path, prompts: Sequence[str]) -> PromptWindow:
    """What the model's text encoders read of `prompts`. Raises ModelError."""
    tokenizers = []
    with quiet_libraries():
        for name in ENCODERS[check_text_folder(folder)]:
            config = files.read_config(folder / name / files.CONFIG_NAME, "text encoder")
            positions = config.get("max_position_embeddings", TOKENS)
            tokenizers.append(load_tokenizer(folder / name.replace("text_encoder", "tokenizer"), positions))
        return PromptWindow(tokenizers, prompts)


def _encode(
    folder: Path,
    prompts: Sequence[str],
    null: str,
    size: tuple[int, int],
    encoders: Mapping[str, nn.Module] | None,
) -> TextTable:
    import diffusers

    pipeline = check_text_folder(folder)
    index = files.read_json(folder / "model_index.json", error=ModelError)
    parts: dict[str, Any] = {}
    for name in ENCODERS[pipeline]:
        encoder = encoders[name] if encoders else load_text_encoder(folder / name)
        parts[name] = encoder.requires_grad_(False)
        where = folder / name.replace("text_encoder", "tokenizer")
        config = parts[name].config
        parts[where.name] = load_tokenizer(where, config.max_position_embeddings)
        check_tokens(parts[where.name], config.vocab_size, prompts, where)
    empty = dict.fromkeys(("unet", "vae", "scheduler"), None)
    if pipeline == "StableDiffusionPipeline":
        more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        more = {"add_watermarker": False}
    pipe: Any = getattr(diffusers, pipeline)(**parts, **empty, **more)
    embeds, pooled = [], []
    for start in range(0, len(prompts), ENCODED):
        found = _encoded(pipe, list(prompts[start : start + ENCODED]), folder)
        embeds.append(found[0].float())
        if len(found) == 4:
            pooled.append(found[2].float())
    ids = _token_ids(parts["tokenizer"], prompts, embeds[0].shape[1])
    table = TextTable(tuple(prompts), torch.cat(embeds), ids=ids)
    if pooled:
        both = torch.cat(pooled)
        if not null and index.get("force_zeros_for_empty_prompt", True) and "" in prompts:
            row = list(prompts).index("")
            table.embeds[row] = 0
            both[row] = 0
        height, width = size
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        table = TextTable(table.prompts, table.embeds, both, time_ids, ids)
    del pipe, parts
    gc.collect()
    return table


def _token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """[P, L], as the pipeline pads and cuts them."""
    found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids


def _encoded(pipe: Any, prompts: list[str], folder: Path) -> tuple[Any, ...]:
    """What the pipeline's own `encode_prompt` gives. Raises ModelError where the text encoders cannot."""
    with files.guarded(folder, "its text encoders cannot read the prompts"), torch.no_grad():
        found: tuple[Any, ...] = pipe.encode_prompt(
            prompt=prompts, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    if not all(bool(torch.isfinite(part).all()) for part in found if part is not None):
        raise ModelError(f"{folder}: its text encoders give NaN or infinity; the weights are damaged")
    return found


def load_networks(folder: Path) -> Networks:
    """UNet, VAE and schedule of a diffusers folder, in float32 on the CPU. Raises ModelError."""
    pipeline = check_text_folder(folder)
    unet, vae = load_unet(folder / "unet"), load_module(folder / "vae", "AutoencoderKL")
    return Networks(unet, vae.eval().requires_grad_(False), schedule_of(folder, pipeline))


def networks_of(modules: Mapping[str, nn.Module], configs: Path) -> Networks:
    """The same of a single file's modules; the schedule is that of its config folder."""
    pipeline = check_text_folder(configs)
    unet, vae = modules["unet"].float(), modules["vae"].float()
    return Networks(unet, vae.eval().requires_grad_(False), schedule_of(configs, pipeline))


def latent_size(networks: Networks, resolution: int | None, where: str) -> tuple[int, int]:
    """(height, width) of the latents for images of `resolution` pixels a side; None = what the UNet was trained on.

    Raises RecipeError where VAE or UNet cannot halve it.
    """
    vae, unet = _config(networks.vae), _config(networks.unet)
    size = unet.sample_size
    height, width = (size, size) if isinstance(size, int) else (size or (0, 0))
    if resolution is None:
        if not height:
            raise ModelError(f"{where}: the UNet's config has no sample_size; give resolution")
        return int(height), int(width)
    factor = 2 ** (len(vae.block_out_channels) - 1)
    step = factor * 2 ** (len(unet.block_out_channels) - 1)
    if resolution % step:
        near = max(step, round(resolution / step) * step)
        raise RecipeError(
            f"resolution: {resolution} pixels cannot be halved by this model's VAE and UNet; give a multiple of {step}, "
            f"such as {near}"
        )
    return resolution // factor, resolution // factor


def pixel_size(networks: Networks, latents: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of images from latents of that size."""
    factor = 2 ** (len(_config(networks.vae).block_out_channels) - 1)
    return latents[0] * factor, latents[1] * factor


def check_fit(networks: Networks, table: TextTable, where: Path) -> None:
    """Raises ModelError where the parts are not of one model: text width, added conditions."""
    unet = _config(networks.unet)
    width = unet.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    if table.embeds.shape[-1] != width:
        raise ModelError(f"{where}: the text encoder gives {table.embeds.shape[-1]} channels, the UNet wants {width}")
    if (unet.addition_embed_type == "text_time") != (table.pooled is not None):
        raise ModelError(f"{where}: UNet and text encoders are of different kinds of models (added conditions)")
    if table.pooled is not None and table.time_ids is not None:
        added = unet.projection_class_embeddings_input_dim - table.time_ids.numel() * unet.addition_time_embed_dim
        if table.pooled.shape[-1] != added:
            raise ModelError(f"{where}: text_encoder_2 gives {table.pooled.shape[-1]} channels, the UNet wants {added}")


def text_denoiser(
    networks: Networks, table: TextTable, null: str, latents: tuple[int, int], channels_last: bool = True
) -> TextDenoiser:
    """The frozen teacher."""
    row = table.index([null])[0]
    return TextDenoiser(networks.unet, networks.schedule, table, networks.vae, row, latents, channels_last).freeze()


def _config(module: nn.Module) -> Any:
    return module.config


def unique(*groups: Sequence[str]) -> tuple[str, ...]:
    """Prompts of all groups, each once, in order."""
    return tuple(dict.fromkeys(prompt for group in groups for prompt in group))
