"""Models of the Hugging Face hub: their configs are looked at first, then of the weights those that are read are fetched."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from pecker_fast.errors import ModelError
from pecker_fast.files.folders import CONFIG_NAME, check_configs
from pecker_fast.files.index import JUDGES, PARTS, SMALL_FILES, TEXTS
from pecker_fast.files.reading import first_line
from pecker_fast.files.weights import find_weights, no_weights, weights_name

_FOLDERS = tuple(part for part in PARTS if part)
# configs, tokenizers, indexes of shards: what is small
SMALL = [f"{part}/{name}" if part else name for part in PARTS for name in SMALL_FILES[part] if name not in TEXTS]
SMALL += ["diffusion_pytorch_model*.index*.json", *(f"{part}/*.index*.json" for part in _FOLDERS)]
# where the hub cannot say what it has: of the weights at the top a diffusers folder has no need
PLAIN = [*SMALL, "diffusion_pytorch_model*.safetensors", *(f"{part}/*.safetensors" for part in _FOLDERS)]
NOT_PLAIN = ["*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp32*.safetensors", "*ema*.safetensors"]


class HubSilent(ModelError):
    """The hub could not be asked, and nothing of the model is in its cache."""


def look_at_hub(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model with what is small of it, checked; None where the hub cannot be asked.

    Raises ModelError for a model that is not there or would be refused.
    """
    try:
        return _checked(name, revision)
    except HubSilent:
        return None


def fetch(name: str, revision: str | None) -> Path:
    """The folder of a hub model, of whose weights those are there that are read. Raises ModelError, before anything large
    is fetched where the configs or the list of files tell."""
    folder = _checked(name, revision)
    commit = folder.name if folder.parent.name == "snapshots" else revision  # the same one, should the hub move on
    listed = _listed(name, commit)
    if listed is not None:
        return _download(name, commit, allow_patterns=[*SMALL, *_weights(name, listed)])
    try:
        return _download(name, commit, allow_patterns=PLAIN, ignore_patterns=NOT_PLAIN)
    except HubSilent:
        if find_weights([file.name for file in check_configs(folder).iterdir()]) is None:
            raise
        return folder  # what another tool has left in the cache, such as a variant


def _checked(name: str, revision: str | None) -> Path:
    folder = _download(name, revision, allow_patterns=SMALL)
    check_configs(folder)
    return folder


def _weights(name: str, listed: list[str]) -> list[str]:
    """The files of a hub model that hold the weights of its parts. Raises ModelError for a part that has none to take."""
    wanted: list[str] = []
    unet = "unet" if f"unet/{CONFIG_NAME}" in listed else ""
    for part in (unet, *(part for part in _FOLDERS if part != "unet")):
        prefix = f"{part}/" if part else ""
        names = [file.removeprefix(prefix) for file in listed if file.startswith(prefix)]
        names = [file for file in names if "/" not in file]
        if part in JUDGES:
            wanted += [prefix + file for file in names if file.endswith(".safetensors")]
        if CONFIG_NAME not in names or part in (*JUDGES, "tokenizer", "tokenizer_2", "scheduler"):
            continue
        found = find_weights(names, weights_name(part))
        if found is None:
            raise ModelError(f"{name}: {part or 'the UNet'}: {no_weights(names, weights_name(part))}")
        if not found.sharded:
            wanted.append(prefix + found.file)
            continue
        stem = weights_name(part).removesuffix(".safetensors")
        mark = f".{found.variant}" if found.variant else ""
        shapes = (f"{stem}{mark}-?????-of-?????.safetensors", f"{stem}-?????-of-?????{mark}.safetensors")
        wanted += [prefix + file for file in names if any(fnmatch.fnmatchcase(file, shape) for shape in shapes)]
    return wanted


def _listed(name: str, revision: str | None) -> list[str] | None:
    """All files of a hub model; None where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, revision=revision)
    except Exception:  # the configs are there already: what is wrong shows when the weights are fetched
        return None


def _download(name: str, revision: str | None, **patterns: Any) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except Exception as reason:  # the client raises a wide family: HTTP, cache, offline, validation
        answered = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
        kind = ModelError if isinstance(reason, answered) else HubSilent
        why = f"{type(reason).__name__}: {first_line(reason)}"
        raise kind(
            f"{name}: no such local folder, and the Hugging Face hub did not give it ({why}); "
            "give a local folder or a shipped model"
        ) from None
