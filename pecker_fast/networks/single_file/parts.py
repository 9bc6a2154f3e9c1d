"""The modules of a Stable Diffusion model from their configurations: on the meta device, so for shapes alone, or filled.

Only classes of diffusers and transformers named here are ever made; a configuration cannot name others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.quiet import quiet_diffusers
from pecker_fast.networks.single_file.names import (
    CLIP,
    TEXT_ENCODERS,
    UNET_PREFIX,
    VAE_PREFIX,
    Entry,
    text_plan,
    unet_plan,
    vae_plan,
)

_TEXT_KEYS = files.TEXT_ENCODER.keys() - {"dropout"}  # which the library has no use for
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_UNET_BLOCKS = {
    "down_block_types": {"CrossAttnDownBlock2D", "DownBlock2D"},
    "up_block_types": {"CrossAttnUpBlock2D", "UpBlock2D"},
    "mid_block_type": {"UNetMidBlock2DCrossAttn"},
}


def parts_of(kind: str) -> tuple[str, ...]:
    """Names of the weighted parts of a `kind`, which are also their folders."""
    return ("unet", "vae", *TEXT_ENCODERS[kind])


def prefix_of(part: str, kind: str) -> str:
    """What the names of a part's tensors begin with in the original file."""
    return {"unet": UNET_PREFIX, "vae": VAE_PREFIX}.get(part) or TEXT_ENCODERS[kind][part][0]


def config_kind(part: str) -> str:
    """Which of `files.CONFIGS` the config of a part is."""
    return _CLASSES.get(part, "text encoder")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of one part; raises ModelError when it is missing, damaged or names code."""
    files.check_parts(folder.parent, (folder.name,))
    return files.read_config(folder / files.CONFIG_NAME, config_kind(folder.name))


def empty_module(part: str, config: Mapping[str, Any], where: Path | None = None) -> nn.Module:
    """The module of a part on the meta device, in evaluation mode; raises ModelError for an unsupported configuration.

    where: the file or folder of the configuration, for messages."""
    wanted = _CLASSES.get(part)
    if wanted and config.get("_class_name", wanted) != wanted:
        raise ModelError(f"{part}: _class_name is {config['_class_name']!r}; only {wanted} is supported in this place")
    with files.guarded(where or part, "its config makes no module"), quiet_diffusers(), torch.device("meta"):
        return _make(part, dict(config)).eval()


def _make(part: str, config: dict[str, Any]) -> nn.Module:
    if part == "unet":
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(config)
        for key, known in _UNET_BLOCKS.items():
            types = unet.config[key]
            for block in [types] if isinstance(types, str) or types is None else types:
                if block not in known:
                    raise ModelError(f"unet: {key} {block!r} has no place in the original layout")
        if unet.config.dual_cross_attention:
            raise ModelError("unet: dual_cross_attention has no place in the original layout")
        return unet
    if part == "vae":
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(config)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text_config = CLIPTextConfig(**{key: value for key, value in config.items() if key in _TEXT_KEYS})
    return (CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel)(text_config)


def shapes_of(part: str, module: nn.Module) -> dict[str, torch.Size]:
    """Name (of today's diffusers; text encoders with `text_model.`) → shape of every tensor of a module."""
    return {canonical(part, name): tensor.shape for name, tensor in module.state_dict().items()}


def canonical(part: str, name: str) -> str:
    """The name of a text encoder's tensor with the wrapper `text_model.` that newer transformers have dropped."""
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        return f"text_model.{name}"
    return name


# constants, and the image side of a whole CLIP model: nothing of them is read when a prompt is encoded
_SPARE_TEXT = re.compile(r"text_model\.(embeddings\.position_ids|logit_scale|vision_model\..+|visual_projection\..+)")


def canonical_text(part: str, weights: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """A text encoder's tensors under canonical names, without what is not read; raises ModelError for one held twice."""
    named: dict[str, Tensor] = {}
    for old, tensor in weights.items():
        name = canonical(part, old)
        if _SPARE_TEXT.fullmatch(name) or (part == "text_encoder" and name == "text_projection.weight"):
            continue
        if name in named:
            raise ModelError(f"{where}: tensor {name} is there twice, with and without text_model.; remove one")
        named[name] = tensor
    return named


def plan_of(part: str, kind: str, names: Iterable[str]) -> list[Entry]:
    """How the tensors `names` of a part are laid out in the original file; raises ModelError."""
    if part == "unet":
        return unet_plan(names)
    return vae_plan(names) if part == "vae" else text_plan(part, kind, names)


def check_names(what: str, held: Collection[str], wanted: Collection[str]) -> None:
    """Raise ModelError, naming the first of them, unless the tensors `held` are exactly those `wanted`."""
    for verb, names in (("lacks", set(wanted) - set(held)), ("has no place for", set(held) - set(wanted))):
        if names:
            raise ModelError(f"{what} {verb} {min(names)} ({len(names)} such tensors); does the config belong to it?")


def check_tensors(what: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ModelError, naming the first tensor, unless `tensors` are exactly those of `shapes`."""
    check_names(what, tensors, shapes)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ModelError(f"{what}: {name} has shape {list(tensors[name].shape)}, {list(shape)} was expected")


def fill(part: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module with `tensors` (canonical names, already checked) as its weights: not copied, dtypes kept."""
    state = {name: tensors[canonical(part, name)] for name in module.state_dict()}
    module.load_state_dict(state, strict=True, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            assert leaf == "position_ids", name
            ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(leaf, ids, persistent=False)
    return module


def to_original(plan: Iterable[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part as the original file holds them."""
    result = {}
    for entry in plan:
        given = [tensors[name] for name in entry.names]
        if entry.change == "join":
            result[entry.original] = torch.cat(given)
        elif entry.change == "transpose":
            result[entry.original] = given[0].T.contiguous()
        else:
            result[entry.original] = given[0][:, :, None, None] if entry.change == "conv" else given[0]
    return result


def from_original(plan: Iterable[Entry], tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The inverse of `to_original`; raises ModelError for a missing tensor or one of a shape that cannot be cut."""
    result = {}
    for entry in plan:
        if entry.original not in tensors:
            raise ModelError(f"{what} lacks {entry.original}; is the file whole, and does the config belong to it?")
        given = tensors[entry.original]
        if entry.change == "join":
            if given.ndim == 0 or given.shape[0] % 3:
                raise ModelError(f"{what}: {entry.original} has shape {list(given.shape)}, not query, key and value")
            # copies, since views of one storage could not be saved again
            result.update({name: piece.clone() for name, piece in zip(entry.names, given.chunk(3))})
            continue
        if entry.change == "transpose":
            given = given.mT.contiguous() if given.ndim == 2 else given
        elif entry.change == "conv" and given.ndim > 2 and set(given.shape[2:]) == {1}:
            given = given.reshape(given.shape[:2])
        result[entry.names[0]] = given
    return result


def is_spare(name: str, part: str, kind: str, names: Iterable[str], held: Collection[str]) -> bool:
    """Whether a tensor of the original file (without its prefix) is known to be of no use to the diffusers module.

    names: the original names (without prefix) that are used; held: all that are there. Spare are CLIP's position ids and
    logit scale, the loss of the autoencoder, and in 2.x the projection and the last layer, which the model never evaluates.
    That layer comes with the projection alone: elsewhere a layer too many means that the config is not the file's own.
    """
    if part == "vae":
        return name.startswith("loss.")
    if part == "unet":
        return False
    if TEXT_ENCODERS[kind][part][1] == CLIP:
        return name == "text_model.embeddings.position_ids"
    if name in ("logit_scale", "attn_mask") or (kind == "sd2" and name == "text_projection"):
        return True
    layers = {int(used.split(".")[2]) for used in names if used.startswith("transformer.resblocks.")}
    return kind == "sd2" and "text_projection" in held and name.startswith(f"transformer.resblocks.{len(layers)}.")
