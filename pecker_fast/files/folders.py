"""Model folders: what is refused before anything of them is loaded, and what of them is left out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from pecker_fast.errors import ModelError
from pecker_fast.files.guard import guarded
from pecker_fast.files.index import (
    INDEX_NAME,
    JUDGES,
    NO_CODE,
    PARTS,
    SMALL_FILES,
    TEXTS,
    UNETS,
    check_index,
    parts_beside,
    read_index,
)
from pecker_fast.files.links import check_entry, tree_of
from pecker_fast.files.reading import (
    NO_PICKLE,
    PICKLE_SUFFIXES,
    check_no_pointer,
    check_tensors,
    read_json,
    reason_of,
)
from pecker_fast.files.weights import variant_of, weight_files, weights_name

CONFIG_NAME = "config.json"
_WEIGHTED = tuple(part for part in PARTS if part not in ("", "scheduler", "tokenizer", "tokenizer_2", *JUDGES))
_WORDS = ("vocab.json", "tokenizer.json")  # whose keys are anybody's words; looked at when the tokenizer is loaded
_DEPTH = 8  # of objects in a config
_ENTRIES = 10_000  # of a folder


def check_model_folder(path: str | Path) -> Path:
    """The folder inside `path` that holds the UNet's config.json and safetensors weights.

    Raises ModelError, naming file and remedy, for a folder that is missing or damaged, holds only pickles, is no
    UNet2DModel, names code of its own, or whose links or file names lead out of it. Nothing but JSON is read.
    """
    with guarded(path, "cannot be looked through"):
        unet = check_configs(path)
        for file in weight_files(unet):
            check_tensors(file, error=ModelError)
        return unet


def check_configs(path: str | Path) -> Path:
    """`check_model_folder` without a look at the weights, which need not be there."""
    root = Path(path)
    if root.is_file():
        raise ModelError(f"{root}: {NO_PICKLE if root.suffix in PICKLE_SUFFIXES else 'a model folder was expected'}")
    if not root.is_dir():
        raise ModelError(f"{root}: no such model folder")
    check_parts(root, PARTS)
    unet = unet_folder(root)
    if not (unet / CONFIG_NAME).is_file():
        kind = read_index(root).get("_class_name")
        what = f"a {kind} is not supported yet" if isinstance(kind, str) else "nothing to train"
        raise ModelError(f"{root}: no unet/{CONFIG_NAME} or {CONFIG_NAME} in this model folder ({what})")
    name = read_json(unet / CONFIG_NAME, error=ModelError).get("_class_name")
    if name not in UNETS:
        raise ModelError(f"{unet / CONFIG_NAME}: _class_name is {name!r}; only {' and '.join(UNETS)} are supported")
    return unet


def unet_folder(root: Path) -> Path:
    """Where a model folder has its UNet: in unet/, or at the top."""
    return root / "unet" if (root / "unet").is_dir() else root


def check_parts(root: Path, parts: Iterable[str]) -> None:
    """Raises ModelError where a part of a model folder links out of it or names code."""
    for part in parts:
        _check_part(root / part, root)


def _check_part(folder: Path, root: Path) -> None:
    """Links of one folder stay inside the model, its JSON files name no code, its small files are there."""
    if not folder.is_dir():
        return
    tree, part = tree_of(root), "" if folder == root else folder.name
    for entry in [folder, *_entries(folder)]:
        if entry != root:
            check_entry(entry, tree)
    for name in SMALL_FILES.get(part, (CONFIG_NAME,)):
        if name in TEXTS or not (folder / name).is_file():
            continue
        if name in _WORDS or not name.endswith(".json"):
            check_no_pointer(folder / name, error=ModelError)
        else:
            _check_config(folder / name, read_json(folder / name, error=ModelError))


def _entries(folder: Path) -> list[Path]:
    try:
        found = list(islice(folder.iterdir(), _ENTRIES + 1))
    except OSError as reason:
        raise ModelError(f"{folder}: cannot be read: {reason_of(reason)}") from None
    if len(found) > _ENTRIES:
        raise ModelError(f"{folder}: holds more than {_ENTRIES:,} entries; no model has so many, is it another folder?")
    return sorted(entry for entry in found if not entry.name.startswith("._"))  # of a Mac's archiver


def _check_config(path: Path, config: Any) -> None:
    """Refuse a JSON file of a model that names code to import."""
    if not isinstance(config, dict):
        raise ModelError(f"{path}: damaged: a JSON object was expected")
    code = _code(config)
    if code is not None:
        raise ModelError(f"{path}: {code} {NO_CODE}")
    if path.name == INDEX_NAME:
        check_index(path, config)


def _code(config: dict[str, Any], depth: int = 0) -> str | None:
    """The key of a config, or of an object in it, that names code; None where there is none."""
    found = next((key for key in ("auto_map", "custom_pipeline", "custom_pipelines") if config.get(key)), None)
    if found is None and not isinstance(config.get("_class_name", ""), str):
        found = "_class_name"
    for key, value in config.items():
        if isinstance(value, str) and (value.endswith(".py") or (".py" in value and "--" in value)):
            found = key
        for inner in value if isinstance(value, list) else (value,):
            if isinstance(inner, dict) and depth < _DEPTH:
                found = found or _code(inner, depth + 1)
    return found


def model_notes(root: Path) -> list[str]:
    """What a user is told of a model folder: parts that are left out, variants that stand in for the plain files."""
    if not root.is_dir():
        return []
    notes = []
    beside = parts_beside(read_index(root))
    beside += ["unet_ema"] if (root / "unet_ema").is_dir() else []
    if beside:
        notes.append(f"{root}: left out, never loaded: {', '.join(beside)}")
    unet = [] if (root / "unet").is_dir() else [""]
    found = {part: variant_of(root / part, weights_name(part)) for part in (*unet, *_WEIGHTED)}
    for variant in sorted({variant for variant in found.values() if variant}):
        parts = ", ".join(part or "the weights" for part, taken in found.items() if taken == variant)
        notes.append(f"{root}: the {variant} variant is taken for {parts}; there is no plain file")
    return notes
