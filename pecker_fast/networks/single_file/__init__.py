"""Single-file checkpoints in the original Stable Diffusion layout: written, changed and read. Safetensors only.

A diffusers folder and its single file hold the same bits under other names: `to_single_file` and `load_single_file`
are each other's inverse for Stable Diffusion 1.x, 2.x and SDXL of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.kinds import other_channels
from pecker_fast.networks.marks import prediction_keys
from pecker_fast.networks.numbers import check_numbers
from pecker_fast.networks.schedule import load_schedule
from pecker_fast.networks.single_file import parts
from pecker_fast.networks.single_file.names import UNET_PREFIX, kind_of_single_file, unet_plan
from pecker_fast.networks.single_file.parts import canonical, canonical_text
from pecker_fast.networks.trial import trial_pass

__all__ = [
    "canonical",
    "canonical_text",
    "kind_of_folder",
    "kind_of_single_file",
    "load_single_file",
    "load_text_encoder",
    "put_unet",
    "replace_unet",
    "to_single_file",
    "unet_map",
    "unet_names",
    "unet_of",
]

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def unet_map(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers name → original name (with `model.diffusion_model.`) of every tensor of a UNet2DConditionModel.

    config: as in unet/config.json. Raises ModelError for a UNet that the original layout cannot hold.
    """
    return unet_names(parts.shapes_of("unet", parts.empty_module("unet", config)))


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """`unet_map` from the diffusers names of all tensors of a UNet, without its config; raises ModelError."""
    return {entry.names[0]: entry.original for entry in unet_plan(names)}


def kind_of_folder(folder: Path) -> str:
    """ "sd1" | "sd2" | "sdxl" of a diffusers folder; raises ModelError for any other pipeline."""
    index = files.read_json(folder / "model_index.json", error=ModelError)
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in _PIPELINES:
        raise ModelError(f"{folder}: a single file of a {name!r} is not supported yet; only {' and '.join(_PIPELINES)}")
    if name == "StableDiffusionXLPipeline":
        return "sdxl"
    activation = parts.read_config(folder / "text_encoder").get("hidden_act", "quick_gelu")
    # the files do not say which it is: every tool takes OpenAI's CLIP for 1.x and OpenCLIP for 2.x
    kind = {"quick_gelu": "sd1", "gelu": "sd2"}.get(str(activation))
    if kind is None:
        raise ModelError(
            f"{folder / 'text_encoder'}: hidden_act {activation!r} is neither quick_gelu (1.x) nor gelu (2.x)"
        )
    return kind


def to_single_file(
    folder: Path,
    output: Path,
    *,
    unet: Mapping[str, Tensor] | None = None,
    marks: Mapping[str, str] | None = None,
) -> Path:
    """Write a diffusers folder as one safetensors file in the original layout, dtypes kept; returns `output`.

    folder: model_index.json, unet/, vae/, text_encoder/ and for SDXL text_encoder_2/, in safetensors, possibly sharded.
    unet: tensors under diffusers' names that take the place of the folder's UNet, whose weights are then not read.
    marks: metadata of the file beside the format. An SDXL model that predicts velocity gets the tensors by which other
    programs know that (`v_pred`, `ztsnr`).
    Raises ModelError (folder unsupported, damaged or not matching its configs) and OutputError.
    """
    folder = Path(folder)
    kind = kind_of_folder(folder)
    tensors: dict[str, Tensor] = {}
    for part in parts.parts_of(kind):
        shapes = parts.shapes_of(part, parts.empty_module(part, parts.read_config(folder / part)))
        weights = dict(unet) if part == "unet" and unet is not None else _read_part(folder, part)
        parts.check_tensors(f"{folder / part}", weights, shapes)
        tensors |= parts.to_original(parts.plan_of(part, kind, weights), weights)
    if kind == "sdxl" and (folder / "scheduler").is_dir():
        tensors |= {name: torch.zeros(0) for name in prediction_keys(load_schedule(folder / "scheduler"))}
    files.write_tensors(output, tensors, {"format": "pt", **(marks or {})})
    return Path(output)


def _read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """Weights of one part under today's names."""
    if not (folder / part).is_dir():
        raise ModelError(f"{folder / part}: no such folder, although model_index.json promises this part")
    files.check_parts(folder, (part,))
    weights = files.read_weights(folder / part, files.weights_name(part))
    return canonical_text(part, weights, folder / part) if part.startswith("text_encoder") else weights


def replace_unet(
    single: Path,
    output: Path,
    unet: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    marks: Mapping[str, str] | None = None,
) -> Path:
    """Write `single` again with the UNet's tensors replaced; all else, metadata too, stays bit for bit.

    marks: metadata to add. unet: all tensors of the UNet under diffusers' names; their dtypes are kept.
    config: its unet/config.json; None = the names in `unet` say enough.
    Raises ModelError when `unet` is not the file's UNet in names and shapes, and for a file that keeps an averaged copy
    of its UNet beside it (`model_ema.*`), which would go on knowing what was forgotten; and OutputError.
    """
    names = unet_map(config) if config is not None else unet_names(unet)
    tensors, metadata = files.read_tensors(single, error=ModelError)
    put_unet(tensors, unet, names, single)
    files.write_tensors(output, tensors, {**metadata, **(marks or {})})
    return Path(output)


def unet_of(tensors: Mapping[str, Tensor], names: Mapping[str, str], where: Path) -> dict[str, Tensor]:
    """The UNet of a single file's `tensors` under diffusers' names; `names` as from `unet_map`. Raises ModelError."""
    parts.check_names(f"{where}", [name for name in tensors if name.startswith(UNET_PREFIX)], names.values())
    return {name: tensors[original] for name, original in names.items()}


def put_unet(tensors: dict[str, Tensor], unet: Mapping[str, Tensor], names: Mapping[str, str], where: Path) -> None:
    """Replace the UNet among a single file's `tensors` in place; raises ModelError as `replace_unet` does."""
    if any(name.startswith("model_ema.") for name in tensors):
        raise ModelError(
            f"{where}: holds a second, averaged copy of the UNet (model_ema.*) that would keep what was forgotten; "
            "give the file without it"
        )
    old = unet_of(tensors, names, where)
    parts.check_tensors(f"{where}: the new UNet", unet, {name: tensor.shape for name, tensor in old.items()})
    tensors.update({original: unet[name] for name, original in names.items()})


def _check_first_layer(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError where the UNet takes more than latents: an inpainting or depth model."""
    first = tensors.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and first.ndim == 4 else None
    if (what := other_channels(channels)) is not None:
        raise ModelError(
            f"{path}: the UNet takes {channels} channels: {what}; inpainting and depth models are not supported yet"
        )


def load_text_encoder(folder: Path) -> nn.Module:
    """The text encoder in `folder` (text_encoder or text_encoder_2), in float32 and evaluation mode. Raises ModelError.

    Its tensors may have the names of any transformers: with and without `text_model.`, with constants beside the weights.
    """
    part = folder.name
    config, path, name = parts.read_config(folder), folder / files.CONFIG_NAME, files.weights_name(part)
    held = files.empty_weights(folder, name)
    files.check_size(path, config, parts.config_kind(part), files.size_of_shapes(t.shape for t in held.values()))
    module = parts.empty_module(part, config, path)
    _text_weights(folder, held, module)  # the headers first: what does not belong to the config is never read
    weights = _text_weights(folder, files.read_weights(folder, name), module)
    return parts.fill(part, module, {key: tensor.float() for key, tensor in weights.items()})


def _text_weights(folder: Path, tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The weights of a text encoder's folder under canonical names, no tensor missing and none left over; raises ModelError."""
    weights = canonical_text(folder.name, tensors, folder)
    parts.check_tensors(f"{folder}", weights, parts.shapes_of(folder.name, module))
    check_numbers(folder, weights)
    return weights


def load_single_file(path: Path, config_folder: Path) -> dict[str, nn.Module]:
    """The modules of a single file: "unet", "vae", "text_encoder" and for SDXL "text_encoder_2", in evaluation mode.

    What `from_single_file` of diffusers gives, without a network, for any size and in the dtypes of the file; and strict
    where that is not: every tensor of every part must be there, in the shape that its config in `config_folder`
    (PART/config.json) says, and none may be left over. Raises ModelError. Memory: the tensors once.
    """
    path, config_folder = Path(path), Path(config_folder)
    tensors = files.empty_tensors(
        path, error=ModelError
    )  # the header first: what does not fit its configs is never read
    kind = kind_of_single_file(tensors)
    _check_first_layer(tensors, path)
    modules = {part: _planned(path, config_folder, part, kind, tensors) for part in parts.parts_of(kind)}
    tensors, _ = files.read_tensors(path, error=ModelError)
    return {part: parts.fill(part, m, _weights(path, part, kind, m, tensors)) for part, m in modules.items()}


def _planned(path: Path, config_folder: Path, part: str, kind: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module of a part on the meta device, once the config is found to be that of the file's `tensors`."""
    config, where = parts.read_config(config_folder / part), config_folder / part / files.CONFIG_NAME
    files.check_size(where, config, parts.config_kind(part), files.size_of_shapes(t.shape for t in tensors.values()))
    module = parts.empty_module(part, config, where)
    _weights(path, part, kind, module, tensors)
    trial_pass(module, where)
    return module


def _weights(path: Path, part: str, kind: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights under canonical names, no tensor missing and none left over; raises ModelError."""
    shapes, prefix, what = parts.shapes_of(part, module), parts.prefix_of(part, kind), f"{path}: {part}"
    plan = parts.plan_of(part, kind, shapes)
    used = {entry.original.removeprefix(prefix) for entry in plan}
    held = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    spare = sorted(name for name in held - used if not parts.is_spare(name, part, kind, used, held))
    if spare:
        raise ModelError(f"{what} has no place for {prefix}{spare[0]} ({len(spare)} in all); is the config its own?")
    weights = {name: files.widened(tensor) for name, tensor in parts.from_original(plan, tensors, what).items()}
    parts.check_tensors(what, weights, shapes)
    check_numbers(what, weights)
    return weights
