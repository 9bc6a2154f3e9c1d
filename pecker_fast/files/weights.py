"""Weights of one module of a model folder: which files hold them, and their tensors under today's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pecker_fast.errors import ModelError
from pecker_fast.files.reading import (
    NO_PICKLE,
    PICKLE_SUFFIXES,
    empty_tensors,
    is_there,
    read_json,
    read_tensors,
    reason_of,
)
from pecker_fast.files.values import shown

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS_NAME = "model.safetensors"
VARIANTS = ("fp32", "fp16", "bf16")  # in this order, where the plain file is missing; never ema or non_ema
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(
    r"((?:.+\.)?attentions\.\d+)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)"
)
_WRAPPER = re.compile(r"(?:(?:module|_orig_mod|base_model|model|unet|vae|text_encoder|text_encoder_2)\.)+")


@dataclass(frozen=True)
class Weights:
    """The file to read: the weights, or the index of their shards; `variant` None = the plain one."""

    file: str
    variant: str | None = None

    @property
    def sharded(self) -> bool:
        return self.file.endswith(".json")


def weights_name(part: str) -> str:
    """What the weights of a part of a model folder are called."""
    return TEXT_WEIGHTS_NAME if part.startswith("text_encoder") else WEIGHTS_NAME


def find_weights(names: Collection[str], name: str = WEIGHTS_NAME) -> Weights | None:
    """Which of the files `names` of one folder holds its weights: the plain file, its shards, or a variant in half
    precision; None where there is nothing of the kind."""
    stem = name.removesuffix(".safetensors")
    for variant in (None, *VARIANTS):
        if variant is None:
            candidates: Iterable[str] = (name, f"{name}.index.json")
        else:
            whole = f"{stem}.{variant}.safetensors"
            candidates = (
                whole,
                f"{name}.index.{variant}.json",
                f"{name}.{variant}.index.json",
                f"{whole}.index.json",
            )
        for candidate in candidates:
            if candidate in names:
                return Weights(candidate, variant)
    return None


def no_weights(names: Iterable[str], name: str = WEIGHTS_NAME) -> str:
    """Why a folder with the files `names` has no weights that are taken, and what to do."""
    stem = name.removesuffix(".safetensors")
    others = sorted(other for other in names if other.endswith(".safetensors"))
    shards = [other for other in others if re.search(r"-\d{5}-of-\d{5}", other)]
    if shards:
        return f"{name} is missing, and of its shards ({shards[0]}, …) the index {name}.index.json; fetch it again"
    copies = [other for other in others if other.startswith(f"{stem}.")]
    if copies:
        return f"{name} is missing; of the copies there ({', '.join(copies[:4])}) rename the one you mean to {name}"
    if any(Path(other).suffix.lower() in PICKLE_SUFFIXES for other in names):
        return f"holds only pickle weights; {NO_PICKLE}"
    return f"{name} is missing; the folder holds no safetensors weights"


def weight_files(folder: str | Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """Safetensors files that hold the weights of one module (or their shards in order); raises ModelError."""
    folder = Path(folder)
    found = found_weights(folder, name)
    return _shards(folder / found.file) if found.sharded else [folder / found.file]


def found_weights(folder: Path, name: str = WEIGHTS_NAME) -> Weights:
    """Which file of a folder holds the weights of one module, or lists their shards; raises ModelError."""
    names = _names(folder)
    found = find_weights(names, name)
    if found is None:
        raise ModelError(f"{folder}: {no_weights(names, name)}")
    return found


def variant_of(folder: Path, name: str = WEIGHTS_NAME) -> str | None:
    """The variant that a folder's weights are taken from; None for the plain ones, and where there are none."""
    found = find_weights(_names(folder), name) if folder.is_dir() else None
    return found.variant if found else None


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    except OSError as reason:
        raise ModelError(f"{folder}: cannot be read: {reason_of(reason)}") from None


def _shards(index: Path) -> list[Path]:
    names = shard_names(index)
    for shard in names:
        if not is_there(index.parent / shard):
            raise ModelError(f"{index.parent / shard}: missing, although {index.name} lists it; fetch the model again")
    return [index.parent / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The files of its folder that an index of shards lists, in order; raises ModelError."""
    content = read_json(index, error=ModelError)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: damaged: no weight_map of file names")
    listed = sorted(set(names.values()))
    for shard in listed:
        too_long = len(shard.encode(errors="surrogatepass")) > 255
        if Path(shard).name != shard or shard.startswith(".") or not shard.endswith(".safetensors") or too_long:
            raise ModelError(f"{index}: {shown(shard)} is no safetensors file of this folder; it is not followed")
    return listed


def read_weights(folder: str | Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """All weights of one module, shards joined, in the dtypes of the file and under today's names; raises ModelError."""
    return _joined(folder, name, lambda file: read_tensors(file, error=ModelError)[0])


def empty_weights(folder: str | Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """`read_weights` on the meta device, from the headers alone: what a config is compared with before anything is read."""
    return _joined(folder, name, lambda file: empty_tensors(file, error=ModelError))


def _joined(folder: str | Path, name: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder, name):
        found = read(file)
        if twice := found.keys() & weights.keys():
            raise ModelError(f"{file}: tensor {min(twice)} is in two files of these weights; the index is damaged")
        weights |= found
    return todays_names(weights, Path(folder))


def todays_names(weights: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """What diffusers' `from_pretrained` renames: attention of before its version 0.17, also stored as 1×1 convolutions.

    Raises ModelError for tensors that are named twice, or after a wrapper of the module.
    """
    wrapper = wrapper_of(weights)
    if wrapper is not None:
        raise ModelError(f"{where}: {wrapper}")
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found = _ATTENTION.fullmatch(name)
        if is_old_convolution(name, tensor):
            tensor = tensor.reshape(tensor.shape[:2])
        if found:
            name = f"{found[1]}.{_OLD_ATTENTION.get(found[2], found[2])}.{found[3]}"
        if name in named:
            raise ModelError(f"{where}: tensor {name} is there twice, under its old name and today's; remove one")
        named[name] = tensor
    return named


def is_old_convolution(name: str, tensor: Tensor) -> bool:
    """Whether a weight of an attention is stored as the 1×1 convolution [C, C, 1, 1] or [C, C, 1] that it once was."""
    found = _ATTENTION.fullmatch(name)
    return found is not None and found[3] == "weight" and tensor.ndim > 2 and set(tensor.shape[2:]) == {1}


def wrapper_of(names: Collection[str]) -> str | None:
    """What is wrong, in one line, where tensors are named after a wrapper of their module; None where they are not."""
    found = next((name[: name.index("_orig_mod.")] + "_orig_mod." for name in names if "_orig_mod." in name), None)
    if found is None:
        wrapped = [match[0] for name in names if (match := _WRAPPER.match(name))]
        every = len(wrapped) == len(names)
        found = next((prefix for prefix in wrapped if every or prefix.startswith("module.")), None)
    return named_after(found) if found is not None else None


def named_after(wrapper: str) -> str:
    return (
        f"its tensors are named after a wrapper ({wrapper}…), as parallel and compiled models save them; "
        "save the module inside it, or rename them without it"
    )


def widened(tensor: Tensor) -> Tensor:
    """float8 as float32, which holds each of its values; every other tensor as it is."""
    return tensor.float() if is_float8(tensor) else tensor


def is_float8(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
