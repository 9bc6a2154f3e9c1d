"""Parts of a model folder that go into an exported one: bit for bit, or rewritten where other readers would not find them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.single_file import canonical_text

_SMALL = {".json", ".txt", ".md", ".model", ""}


def copy_part(source: Path, target: Path) -> None:
    """Copy the folder of one part: configs, word lists and the weights that are read, no pickles, no other copies.

    Weights keep their files where stock readers of any version find them: named plainly, text encoders with `text_model.`.
    Others (a variant alone, names of transformers 5, attention as 1×1 convolutions) are written again, every bit kept.
    Raises ModelError, OSError and OutputError.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and is_small(file):
            files.copy_file(file, target / file.name)
    part = source.name
    if part.startswith(("tokenizer", "scheduler")):
        return
    name = files.weights_name(part)
    held = files.weight_files(source, name)
    stored = {key: tensor for file in held for key, tensor in files.read_tensors(file, error=ModelError)[0].items()}
    weights = files.todays_names(stored, source)
    if part.startswith("text_encoder"):
        weights = canonical_text(part, weights, source)
    if files.variant_of(source, name) is None and _found_by_all(stored, weights):
        index = source / f"{name}.index.json"
        for file in [*held, *([index] if len(held) > 1 or held[0].name != name else [])]:
            files.copy_file(file, target / file.name)
        return
    files.write_tensors(target / name, weights, {"format": "pt"})


def _found_by_all(stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether stock readers find the tensors as they are stored: they know old names of attention, not its old shape, and
    transformers 4 does not know names without `text_model.`."""
    flat = any(name.startswith("text_model.") and name not in stored for name in weights)
    return not flat and not any(files.is_old_convolution(name, tensor) for name, tensor in stored.items())


def is_small(file: Path) -> bool:
    """Whether a file of a part is a config, word list or text: nothing hidden, no weights, no index of weights."""
    index = ".safetensors." in file.name or ".bin." in file.name
    return file.suffix in _SMALL and not file.name.startswith(".") and not index


def save_part(module: nn.Module, folder: Path) -> None:
    """Write a VAE or text encoder, in its dtypes, as diffusers and any transformers read it. Raises OutputError."""
    weights: dict[str, Tensor] = module.state_dict()
    source: Any = module
    if folder.name.startswith("text_encoder"):
        weights = canonical_text(folder.name, weights, folder)
        config = json.loads(source.config.to_json_string())
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config |= {"architectures": [type(module).__name__], "dtype": dtype}
    else:
        config = json.loads(source.to_json_string())
    files.write_json(folder / files.CONFIG_NAME, {k: v for k, v in config.items() if k != "_name_or_path"})
    files.write_tensors(folder / files.weights_name(folder.name), weights, {"format": "pt"})
