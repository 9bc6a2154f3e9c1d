"""Parts of a model folder that go into an exported one: bit for bit, or rewritten where other readers would not find them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.numbers import check_numbers
from pecker_fast.networks.single_file import canonical_text

_TEXT, _WORDS = "text encoder", "tokenizer"
_KINDS = {
    **{"vae/config.json": "AutoencoderKL", "text_encoder/config.json": _TEXT, "text_encoder_2/config.json": _TEXT},
    **{"tokenizer_config.json": _WORDS, "special_tokens_map.json": _WORDS, "scheduler_config.json": "scheduler"},
    **{"model_index.json": "model_index.json", "model.json": "model.json"},
}


def copy_part(source: Path, target: Path) -> None:
    """Copy the folder of one part of a model: the files that stock readers know, by name, and the weights that are read.

    Each file is opened once, below the model's own folder, and what is checked afterwards is the copy. Weights keep their
    files where stock readers of any version find them: named plainly, text encoders with `text_model.`. Others (a variant
    alone, names of transformers 5, attention as 1×1 convolutions) are written again, every bit kept.
    Raises ModelError, OSError and OutputError.
    """
    tree = files.tree_of(source.parent)
    copy_small(source, target, files.SMALL_FILES[source.name], tree)
    if source.name.startswith(("tokenizer", "scheduler")):
        return
    name = files.weights_name(source.name)
    found = files.found_weights(source, name)
    files.copy_file(source / found.file, target / found.file, tree)
    for shard in files.shard_names(target / found.file) if found.sharded else ():
        files.copy_file(source / shard, target / shard, tree)
    _as_all_find_them(source, target, name)


def copy_small(source: Path, target: Path, names: Iterable[str], tree: files.Tree) -> None:
    """Copy those of the files `names` that a folder of a model has. tree: the model's. Raises ModelError and OSError."""
    for name in names:
        if not os.path.lexists(source / name):
            continue
        kind = _KINDS.get(name) or _KINDS.get(f"{source.name}/{name}")
        if kind is not None:
            files.read_config(source / name, kind)
        files.copy_file(source / name, target / name, tree)
        if kind is not None:  # what is checked is the copy; the first look is for a message that names the original
            files.read_config(target / name, kind)


def _as_all_find_them(source: Path, target: Path, name: str) -> None:
    """Look at the copied weights of a part, and write them again where some stock readers would not find them."""
    held = files.weight_files(target, name)
    stored = {key: tensor for file in held for key, tensor in files.read_tensors(file, error=ModelError)[0].items()}
    weights = files.todays_names(stored, source)
    if source.name.startswith("text_encoder"):
        weights = canonical_text(source.name, weights, source)
    check_numbers(source, weights)
    if files.variant_of(target, name) is None and _found_by_all(stored, weights):
        return
    for file in sorted(target.iterdir()):
        if file.name not in files.SMALL_FILES[source.name]:
            files.remove(file)
    files.write_tensors(target / name, weights, {"format": "pt"})


def _found_by_all(stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether stock readers find the tensors as they are stored: they know old names of attention, not its old shape, and
    transformers 4 does not know names without `text_model.`."""
    flat = any(name.startswith("text_model.") and name not in stored for name in weights)
    return not flat and not any(files.is_old_convolution(name, tensor) for name, tensor in stored.items())


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
