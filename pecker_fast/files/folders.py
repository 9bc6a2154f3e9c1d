"""Model folders: what is refused before anything of them is loaded, and where their weights lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecker_fast.errors import ModelError
from pecker_fast.files.names import shipped_models
from pecker_fast.files.reading import NO_PICKLE, PICKLE_SUFFIXES, check_tensors, read_json, read_tensors, reason_of

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_LIBRARIES = frozenset({"diffusers", "transformers"})
_MODEL_PARTS = ("", "unet", "scheduler", "judge", "generator", "score")
UNETS = ("UNet2DModel", "UNet2DConditionModel")  # the denoising networks there is an interface for


def check_model_folder(path: str | Path) -> Path:
    """The folder inside `path` that holds the UNet's config.json and safetensors weights.

    Raises ModelError, naming file and remedy, for a folder that is missing or damaged, holds only pickles, is no
    UNet2DModel, names code of its own, or whose links or file names lead out of it. Nothing but JSON is read.
    """
    root = Path(path)
    if root.is_file():
        raise ModelError(f"{root}: {NO_PICKLE if root.suffix in PICKLE_SUFFIXES else 'a model folder was expected'}")
    if not root.is_dir():
        raise ModelError(f"{root}: no such model folder; shipped models: {', '.join(shipped_models()) or 'none'}")
    check_parts(root, _MODEL_PARTS)
    unet = root / "unet" if (root / "unet").is_dir() else root
    if not (unet / CONFIG_NAME).is_file():
        raise ModelError(f"{root}: no unet/{CONFIG_NAME} or {CONFIG_NAME} in this model folder")
    name = read_json(unet / CONFIG_NAME, error=ModelError).get("_class_name")
    if name not in UNETS:
        raise ModelError(f"{unet / CONFIG_NAME}: _class_name is {name!r}; only {' and '.join(UNETS)} are supported")
    for file in weight_files(unet):
        check_tensors(file, error=ModelError)
    return unet


def check_parts(root: Path, parts: Iterable[str]) -> None:
    """Raises ModelError where a part of a model folder links out of it or names code."""
    for part in parts:
        _check_part(root / part, root)


def _check_part(folder: Path, root: Path) -> None:
    """Links of one folder stay inside the model, its JSON files name no code."""
    if not folder.is_dir():
        return
    home = root.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent  # the hub's cache: snapshots/REVISION holds links to ../../blobs
    try:
        entries = sorted(folder.iterdir())
    except OSError as reason:
        raise ModelError(f"{folder}: cannot be read: {reason_of(reason)}") from None
    for entry in [folder, *entries]:
        if entry != root and not entry.resolve().is_relative_to(home):
            raise ModelError(f"{entry}: a link that leaves the model folder; copy the file in its place")
        if entry.suffix == ".json" and entry.is_file():
            _check_config(entry, read_json(entry, error=ModelError))


def _check_config(path: Path, config: Any) -> None:
    """Refuse a JSON file of a model that names code to import."""
    if not isinstance(config, dict):
        raise ModelError(f"{path}: damaged: a JSON object was expected")
    code = next((key for key in ("auto_map", "custom_pipeline", "custom_pipelines") if config.get(key)), None)
    if code is None and not isinstance(config.get("_class_name", ""), str):
        code = "_class_name"
    for key, value in config.items():
        if isinstance(value, str) and (value.endswith(".py") or (".py" in value and "--" in value)):
            code = key
        if path.name == "model_index.json" and isinstance(value, list) and value and key[:1] != "_":
            known = len(value) == 2 and (value[0] in _LIBRARIES or value == [None, None])
            code = code if known else key
    if code is not None:
        raise ModelError(f"{path}: {code} names custom code, which is never run; use a plain diffusers model")


def weight_files(folder: str | Path, name: str = WEIGHTS_NAME) -> list[Path]:
    """Safetensors files that hold the weights of one module (`name`, or its shards in order); raises ModelError."""
    folder = Path(folder)
    if (folder / name).exists():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if index.exists():
        content = read_json(index, error=ModelError)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{index}: damaged: no weight_map of file names")
        for shard in names.values():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelError(f"{index}: {shard!r} is no safetensors file of this folder; it is not followed")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / shard}: missing, although {index.name} lists it; fetch the model again")
        return [folder / name for name in sorted(set(names.values()))]
    if folder.is_dir() and any(entry.suffix.lower() in PICKLE_SUFFIXES for entry in folder.iterdir()):
        raise ModelError(f"{folder}: holds only pickle weights; {NO_PICKLE}")
    raise ModelError(f"{folder / name}: missing; the folder holds no safetensors weights")


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All weights of one diffusers module, shards joined; raises ModelError."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights.update(read_tensors(file, error=ModelError)[0])
    return weights
