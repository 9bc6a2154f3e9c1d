"""A delta: the weights that training changed, in one safetensors file that turns the base into the result, bit for bit.

Each changed tensor is held in the smallest of three forms, as tensors named NAME:FORM (and NAME:values):
    mask     1 bit per weight (uint8 [⌈n/8⌉], lowest bit first) and the values of the changed weights [k]
    indices  flat indices, increasing (int32, or int64 from 2³¹ weights on) [k] and the values [k]
    whole    the tensor itself; always so when its dtype or shape changed or the base has none of that name
The metadata holds format, version, the hashes of base and result, notes, the list of the result's tensors
{name: [dtype, shape, "same" | form]}, and since version 2 `head_sha256`, over all of these.
Weights are compared by their bits, so −0 is not 0, and a NaN equals itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.errors import DataError, ModelError, OutputError
from pecker_fast.export.outcome import one_step_index
from pecker_fast.files import hash_of
from pecker_fast.networks import MARKS, ONE_STEP, check_numbers, copy_part, copy_small
from pecker_fast.networks.single_file import put_unet, unet_names, unet_of

FORMAT, VERSION = "pecker-fast delta", "2"
_SEAL = "head_sha256"
_FORMS = {"same": (), "mask": ("mask", "values"), "indices": ("indices", "values"), "whole": ("whole",)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class DeltaStats:
    """What a delta holds: tensors and weights of the result, how many changed, and the sizes of delta and result."""

    tensors: int
    changed_tensors: int
    weights: int
    changed_weights: int
    delta_bytes: int
    result_bytes: int


def write_delta(
    base: Mapping[str, Tensor],
    result: Mapping[str, Tensor],
    path: Path,
    *,
    base_sha256: str,
    metadata: Mapping[str, str] | None = None,
) -> DeltaStats:
    """Write what turns `base` into `result`; see the module for the file.

    base_sha256: `hash_of(base)`, which is checked; metadata: notes to keep in the file.
    Raises DataError for another hash, OutputError when the file cannot be written.
    """
    if hash_of(base) != base_sha256:
        raise DataError(f"{path}: base_sha256 is not the hash of the base given; take it from delta.hash_of(base)")
    stored: dict[str, Tensor] = {}
    listed: dict[str, list[Any]] = {}
    changed_weights = 0
    for name, tensor in sorted(result.items()):
        form, changed, held = _smallest(base.get(name), tensor.detach().cpu().contiguous())
        listed[name] = [_dtype(tensor), list(tensor.shape), form]
        changed_weights += changed
        stored |= {f"{name}:{what}": part for what, part in held.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "base_sha256": base_sha256,
        "result_sha256": hash_of(result),
        "tensors": json.dumps(listed, separators=(",", ":")),
        "metadata": json.dumps(dict(sorted((metadata or {}).items()))),
    }
    header[_SEAL] = files.sha256_value(header)
    if sum(map(len, header.values())) > files.MAX_HEADER_BYTES // 2:
        raise OutputError(f"{path}: names and metadata are too long for the head of a delta file; shorten the metadata")
    files.write_tensors(path, stored, header)
    return DeltaStats(
        tensors=len(result),
        changed_tensors=sum(entry[2] != "same" for entry in listed.values()),
        weights=sum(tensor.numel() for tensor in result.values()),
        changed_weights=changed_weights,
        delta_bytes=Path(path).stat().st_size,
        result_bytes=sum(tensor.numel() * tensor.element_size() for tensor in result.values()),
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> Tensor:
    """The flat tensor as integers, so that equal bits and nothing else are equal."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def _smallest(old: Tensor | None, new: Tensor) -> tuple[str, int, dict[str, Tensor]]:
    """Form, number of changed weights and the parts to store for one tensor (on the CPU, contiguous)."""
    count = new.numel()
    if old is None or old.dtype != new.dtype or old.shape != new.shape:
        return "whole", count, {"whole": new}
    changed = _bits(old) != _bits(new)
    kept = int(changed.sum())
    if kept == 0:
        return "same", 0, {}
    wide = count >= 1 << 31
    sizes = {
        "whole": count * new.element_size(),
        "mask": (count + 7) // 8 + kept * new.element_size(),
        "indices": kept * ((8 if wide else 4) + new.element_size()),
    }
    form = min(sizes, key=lambda key: sizes[key])
    if form == "whole":
        return form, kept, {"whole": new}
    where = changed.nonzero().reshape(-1)
    values = _bits(new)[where].view(new.dtype)
    if form == "mask":
        return form, kept, {"mask": torch.from_numpy(np.packbits(changed.numpy(), bitorder="little")), "values": values}
    return form, kept, {"indices": where if wide else where.to(torch.int32), "values": values}


@dataclass(frozen=True)
class _Delta:
    """A delta file as read: nothing of it is believed until `_result` has compared it with the base."""

    path: Path
    parts: dict[str, Tensor]
    header: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], str]]

    def error(self, text: str) -> DataError:
        return DataError(f"{self.path}: damaged delta file: {text}; fetch or write it again")


def _read(path: Path) -> _Delta:
    """A delta file whose list of tensors is sound and names exactly the parts that are there; raises DataError."""
    parts, header = files.read_tensors(path, error=DataError)
    if header.get("format") != FORMAT:
        raise DataError(f"{path}: not a delta file; one written by pecker-fast was expected")
    version = header.get("version")
    delta = _Delta(Path(path), parts, header, {})
    if _SEAL in header or version == VERSION:
        said = header.pop(_SEAL, None)
        if said != files.sha256_value(header):
            raise delta.error("its notes, list of tensors and hashes are not what its head_sha256 was taken over")
    if version not in ("1", VERSION):
        raise DataError(f"{path}: delta of version {version!r}; this program reads versions 1 and {VERSION}")
    try:
        listed = json.loads(header.get("tensors", ""))
    except (ValueError, RecursionError):
        raise delta.error("its list of tensors is no JSON") from None
    if not isinstance(listed, dict):
        raise delta.error("its list of tensors is no JSON object")
    for name, entry in listed.items():
        if not (
            isinstance(entry, list)
            and len(entry) == 3
            and isinstance(entry[0], str)
            and isinstance(entry[1], list)
            and all(type(size) is int and size >= 0 for size in entry[1])
            and isinstance(entry[2], str)
            and entry[2] in _FORMS
        ):
            raise delta.error(f"the entry of {name} is not [dtype, shape, form]")
        delta.tensors[name] = (entry[0], tuple(entry[1]), entry[2])
    expected = {f"{name}:{what}" for name, (_, _, form) in delta.tensors.items() for what in _FORMS[form]}
    for verb, names in (("lacks", expected - parts.keys()), ("holds the unknown", parts.keys() - expected)):
        if names:
            raise delta.error(f"it {verb} part {min(names)}")
    return delta


def apply_delta(delta_path: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The result, bit for bit, on the CPU; tensors that did not change are those of `base`, not copies.

    Raises DataError, in one line, for a base that the delta was not made from and for a damaged or foreign file.
    """
    return _result(_read(delta_path), base)


def _result(delta: _Delta, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if hash_of(base) != delta.header.get("base_sha256"):
        raise DataError(
            f"{delta.path}: this delta was made from another base model; apply it to the one it was made from"
        )
    result = {name: _patched(delta, name, base.get(name)) for name in delta.tensors}
    if hash_of(result) != delta.header.get("result_sha256"):
        raise delta.error("the result is not the one it promises")
    return result


def _patched(delta: _Delta, name: str, old: Tensor | None) -> Tensor:
    """One tensor of the result. No memory is taken at the word of the file: sizes come from the base or its own parts."""
    dtype, shape, form = delta.tensors[name]
    if form == "whole":
        whole = delta.parts[f"{name}:whole"]
        if _dtype(whole) != dtype or tuple(whole.shape) != shape:
            raise delta.error(f"{name} is not of the dtype and shape in its list")
        return whole
    if old is None or _dtype(old) != dtype or tuple(old.shape) != shape:
        raise delta.error(f"{name} is not of the dtype and shape that the base has")
    old = old.detach().cpu()
    if form == "same":
        return old
    values, where = delta.parts[f"{name}:values"], delta.parts[f"{name}:{form}"]
    if values.ndim != 1 or _dtype(values) != dtype:
        raise delta.error(f"the values of {name} are no list of {dtype}")
    if form == "mask":
        if where.dtype != torch.uint8 or tuple(where.shape) != ((old.numel() + 7) // 8,):
            raise delta.error(f"the mask of {name} does not have one bit per weight")
        bits = np.unpackbits(where.numpy(), bitorder="little")
        if bits[old.numel() :].any():
            raise delta.error(f"the mask of {name} has bits beyond its last weight")
        where = torch.from_numpy(bits[: old.numel()]).nonzero().reshape(-1)
    elif where.ndim != 1 or where.dtype not in (torch.int32, torch.int64):
        raise delta.error(f"the indices of {name} are no list of int32 or int64")
    if len(where) != len(values):
        raise delta.error(f"{name} has {len(values)} values for {len(where)} places")
    where = where.to(torch.int64)
    if len(where) and (where[0] < 0 or where[-1] >= old.numel() or not bool((where.diff() > 0).all())):
        raise delta.error(f"the indices of {name} are not increasing, or out of range")
    flat = _bits(old).clone()
    flat[where] = _bits(values)
    return flat.view(old.dtype).reshape(old.shape)


def delta_of_folders(base: Path, result: Path, path: Path, *, metadata: Mapping[str, str] | None = None) -> DeltaStats:
    """Write the delta between the UNets of two diffusers folders (unet/); one of the two may be a single file instead.

    Raises ModelError when a UNet cannot be read or the two differ in names or shapes; and OutputError.
    """
    base, result = Path(base), Path(result)
    if base.is_file() and result.is_file():
        raise ModelError(f"{result}: two single files; give one of the two models as a diffusers folder")
    if base.is_file():
        new = _folder_unet(result)
        old = _single_unet(base, new)
    else:
        old = _folder_unet(base)
        new = _single_unet(result, old) if result.is_file() else _folder_unet(result)
    if _shapes(old) != _shapes(new):
        raise ModelError(f"{result}: its UNet is not built like that of {base}; a delta needs the same architecture")
    return write_delta(old, new, path, base_sha256=hash_of(old), metadata=metadata)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _folder_unet(folder: Path) -> dict[str, Tensor]:
    return files.read_weights(_unet_folder(folder))


def _unet_folder(folder: Path) -> Path:
    """Where a model folder, looked at as any foreign one, has its UNet: in unet/, or at the top of a class model."""
    if not (folder / "unet").is_dir() and not (folder / files.CONFIG_NAME).is_file():
        raise ModelError(f"{folder}: no unet/ in it; a diffusers folder was expected")
    unet = files.check_model_folder(folder)
    files.read_config(unet / files.CONFIG_NAME, files.read_object(unet / files.CONFIG_NAME)["_class_name"])
    return unet


def _single_unet(path: Path, names: Mapping[str, Any]) -> dict[str, Tensor]:
    return unet_of(files.read_tensors(path, error=ModelError)[0], unet_names(names), path)


def apply_to_folder(delta: Path, base: Path, output: Path) -> Path:
    """Write the model of `base` with the delta's UNet: a diffusers folder for a folder, a single file for a single file.

    Schedule, model.json and card are the result's own, from the delta's notes. Of a folder, the texts beside model_index.json
    and the parts that it names are copied; other weights of the old UNet (variants, pickles, single files) are not, since
    they would keep what was forgotten. `output` must not exist and appears as a whole.

    Raises DataError (the delta, or another base), ModelError (the base) and OutputError.
    """
    delta, base, output = Path(delta), Path(base), Path(output)
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output}: exists already; choose another output")
    read = _read(delta)
    notes = _notes(read)
    if base.is_file():
        tensors, metadata = files.read_tensors(base, error=ModelError)
        names = unet_names(read.tensors)
        unet = _result(read, unet_of(tensors, names, base))
        check_numbers(delta, unet)
        put_unet(tensors, unet, names, base)
        about = {"pecker_fast": json.dumps(notes.about)} if notes.about is not None else {}
        files.write_tensors(output, tensors, metadata | about | notes.marks)
        return output
    old = _folder_unet(base)
    unet = _result(read, old)
    if _shapes(unet) != _shapes(old):
        raise ModelError(f"{delta}: its UNet is not built like that of {base}; a delta needs the same architecture")
    check_numbers(delta, unet)
    with files.whole_folder(output) as temporary:
        index = _copy_model(base, temporary, notes)
        files.write_tensors(temporary / "unet" / files.WEIGHTS_NAME, unet, {"format": "pt", **notes.marks})
        if notes.scheduler is not None:
            files.write_json(temporary / "scheduler" / "scheduler_config.json", notes.scheduler)
            files.write_json(temporary / "model_index.json", one_step_index(index))
        if notes.about is not None:
            files.write_json(temporary / "model.json", notes.about)
        if notes.card is not None:
            files.write_text(temporary / "README.md", notes.card)
    return output


@dataclass(frozen=True)
class _Notes:
    """What a delta tells of its result beside the weights; None where it does not."""

    scheduler: dict[str, Any] | None
    about: dict[str, Any] | None  # model.json
    card: str | None
    marks: dict[str, str]  # what the weights file says of itself


def _notes(delta: _Delta) -> _Notes:
    """Raises DataError for notes that are damaged, or whose schedule is none of ours."""
    try:
        notes = json.loads(delta.header.get("metadata", "{}"))
        scheduler, about = (json.loads(notes.get(key, "null")) for key in ("scheduler", "model"))
        card, t_init = notes.get("card"), int(notes.get("t_init", 0))
        marks = {key: str(notes[key]) for key in MARKS if key in notes}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise delta.error("its notes are no JSON") from None
    if scheduler is not None:
        if not _is_schedule(scheduler):
            raise delta.error("the scheduler in its notes is no EulerDiscreteScheduler")
        files.check_config(delta.path, scheduler, "scheduler")
    if not isinstance(about, dict | None) or not isinstance(card, str | None):
        raise delta.error("model and card in its notes are no mapping and no text")
    if "t_init" in notes:  # of an earlier version where it says no more
        about = {"kind": ONE_STEP, "t_init": t_init, **(about or {})}
    if about is not None:
        about |= {"base_sha256": delta.header.get("base_sha256"), "weights_sha256": delta.header.get("result_sha256")}
    return _Notes(scheduler, about, card, marks)


def _is_schedule(config: Any) -> bool:
    def plain(value: Any) -> bool:
        return isinstance(value, str | int | float | None)

    if not isinstance(config, dict) or config.get("_class_name") != "EulerDiscreteScheduler":
        return False
    return all(plain(v) or (isinstance(v, list) and all(map(plain, v))) for v in config.values())


def _copy_model(base: Path, target: Path, notes: _Notes) -> dict[str, Any] | None:
    """Copy a diffusers folder without its UNet's weights, parts that are left out, and all that stock readers do not know.

    Returns its model_index.json; None for a class model without one. Raises ModelError and OSError.
    """
    unet, index, tree = _unet_folder(base), files.read_index(base), files.tree_of(base)
    for part in sorted(files.USED.keys() & {*index, "scheduler"} - {"unet"}):
        if (base / part).is_dir():
            copy_part(base / part, target / part)
    copy_small(unet, target / "unet", files.SMALL_FILES["unet"], tree)
    texts = {"model_index.json", "model.json", *files.TEXTS}
    copy_small(base, target, sorted(texts - ({"README.md", "model.json"} if notes.about is not None else set())), tree)
    if unet == base and not (base / "scheduler").is_dir():
        copy_small(base, target / "scheduler", files.SMALL_FILES["scheduler"], tree)
    if index:
        files.write_json(target / "model_index.json", files.without_parts_beside(index))
    return index or None
