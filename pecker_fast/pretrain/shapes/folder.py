"""Parts of the pipeline folder: networks written as float16 and read back as the rounded networks they have become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import CheckpointError
from pecker_fast.export import sound
from pecker_fast.networks import load_weights
from pecker_fast.networks.single_file import canonical, canonical_text
from pecker_fast.pretrain.shapes.settings import SCHEDULER

TEXT_WEIGHTS = files.TEXT_WEIGHTS_NAME
TEXT_PART = "text_encoder"
_SEAL = "pecker_fast.sha256"  # of the weights, in their file: a part that is finished is taken over by the next start


def write_network(network: nn.Module, folder: Path, weights_name: str = files.WEIGHTS_NAME) -> None:
    """config.json and the weights as float16; the weights last, so that a folder that has them is whole."""
    source: Any = network.config if weights_name == TEXT_WEIGHTS else network
    config = {key: value for key, value in json.loads(source.to_json_string()).items() if key != "_name_or_path"}
    if weights_name == TEXT_WEIGHTS:
        # transformers reads in the dtype named here: in float32, as diffusers reads the others
        config |= {"architectures": [type(network).__name__], "dtype": "float32"}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    weights = sound(weights, folder)
    files.write_json(folder / files.CONFIG_NAME, config)
    if weights_name == TEXT_WEIGHTS:
        weights = canonical_text(TEXT_PART, weights, folder)  # the names that every transformers reads
    files.write_tensors(folder / weights_name, weights, {"format": "pt", _SEAL: files.hash_of(weights)})


def read_network(network: nn.Module, folder: Path, weights_name: str = files.WEIGHTS_NAME) -> bool:
    """Take over the stored weights; False where none are stored. Raises `ModelError` where they are another network's and
    `CheckpointError` where they are damaged."""
    if not (folder / weights_name).is_file():
        return False
    tensors, metadata = files.read_tensors(folder / weights_name, error=CheckpointError)
    if _SEAL in metadata and metadata[_SEAL] != files.hash_of(tensors):
        raise CheckpointError(
            f"{folder / weights_name}: damaged (its sha256 is not that of what it holds); delete the folder to make it again"
        )
    if weights_name == TEXT_WEIGHTS:
        tensors = canonical_text(TEXT_PART, tensors, folder)
        own = {canonical(TEXT_PART, name): name for name in network.state_dict()}
        tensors = {own.get(name, name): tensor for name, tensor in tensors.items()}
    load_weights(network, {name: _wide(value) for name, value in tensors.items()}, folder)
    network.eval().requires_grad_(False)
    return True


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float16 else value


def write_pipeline(folder: Path, tokenizer: Any) -> None:
    """`tokenizer/`, `scheduler/` and `model_index.json`: what makes the folder a StableDiffusionPipeline."""
    import diffusers

    with files.whole_folder(folder / "tokenizer") as temporary:
        tokenizer.save_pretrained(temporary)
        tokenizer.backend_tokenizer.model.save(str(temporary))  # vocab.json, merges.txt: for older readers
    with files.whole_folder(folder / "scheduler") as temporary:
        diffusers.DDIMScheduler(**SCHEDULER).save_pretrained(temporary)  # type: ignore[attr-defined]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    files.write_json(folder / "model_index.json", index)
