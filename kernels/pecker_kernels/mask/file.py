"""The mask file: safetensors, one uint8 tensor of packed bits per parameter, everything else in the metadata."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from . import bits as bitmask

FORMAT = "pecker_mask"
VERSION = "1"
_KEYS = (
    "format",
    "version",
    "structure",
    "scope",
    "tile",
    "threshold",
    "count",
    "total",
    "density",
    "shapes",
    "provenance",
)


def save(
    path: Path,
    *,
    bits: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    count: int,
    structure: str,
    scope: str,
    tile: tuple[int, int],
    threshold: float | None,
    provenance: Mapping[str, str],
) -> None:
    """Write beside `path` first, then rename: a reader never sees half a file. Arguments as SaliencyMask's; count: ones."""
    # Not needed to use the kernels, so not imported with them.
    from safetensors.torch import save as to_bytes

    total = sum(shape.numel() for shape in shapes.values())
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "structure": structure,
        "scope": scope,
        "tile": json.dumps(list(tile)),
        "threshold": json.dumps(threshold),
        "count": str(count),
        "total": str(total),
        "density": repr(count / total if total else 0.0),
        # A list, because its order is the order of the weights.
        "shapes": json.dumps([[name, list(shape)] for name, shape in shapes.items()]),
        "provenance": json.dumps({str(key): str(value) for key, value in provenance.items()}),
    }
    # One metadata key: the writer orders several by chance, and equal masks are to make equal files.
    data = to_bytes(
        {name: packed.cpu().contiguous() for name, packed in bits.items()},
        metadata={"pecker": json.dumps(metadata)},
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _metadata(path: Path, stored: dict[str, str]) -> dict[str, str]:
    try:
        metadata = json.loads(stored.get("pecker", "{}"))
    except (ValueError, RecursionError) as error:
        raise MaskError(f"{path}: the metadata is not valid JSON") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MaskError(f"{path}: the metadata is not a mapping of strings")
    return metadata


def _json(path: Path, metadata: dict[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise MaskError(f"{path}: metadata key {key!r} is not valid JSON") from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shapes(path: Path, metadata: dict[str, str]) -> dict[str, torch.Size]:
    listed = _json(path, metadata, "shapes")
    shapes: dict[str, torch.Size] = {}
    if not isinstance(listed, list):
        raise MaskError(f"{path}: metadata key 'shapes' is not a list")
    for entry in listed:
        if not (
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list)
        ):
            raise MaskError(f"{path}: metadata key 'shapes' has an entry that is not [name, shape]")
        name, shape = entry
        if not all(_is_size(side) for side in shape) or name in shapes:
            raise MaskError(f"{path}: shape of tensor {name!r} is listed twice or holds something that is not a size")
        # torch's own arithmetic would overflow on a forged size.
        if math.prod(side or 1 for side in shape) >= 1 << 62:
            raise MaskError(f"{path}: tensor {name!r} is listed with more weights than there can be")
        shapes[name] = torch.Size(shape)
    return shapes


def load(path: Path) -> dict[str, Any]:
    """The arguments of SaliencyMask, every one of them validated. Raises MaskError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MaskError(f"there is no mask file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = _metadata(path, file.metadata() or {})
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise MaskError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise MaskError(f"{path} is not a mask file: metadata key 'format' is {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise MaskError(f"{path} has mask version {metadata.get('version')!r}, this package reads {VERSION!r}")
    for key in _KEYS:
        if key not in metadata:
            raise MaskError(f"{path}: metadata key {key!r} is missing")

    shapes = _shapes(path, metadata)
    for name in bits:
        if name not in shapes:
            raise MaskError(f"{path}: tensor {name!r} has no entry in 'shapes'")
    count = 0
    for name, shape in shapes.items():
        if name not in bits:
            raise MaskError(f"{path}: tensor {name!r} is listed in 'shapes' but missing")
        n = shape.numel()
        bitmask.check_bits(bits[name], n, f"{path}: tensor {name!r}")
        if n % 8 and int(bits[name][-1]) >> (n % 8):
            raise MaskError(f"{path}: tensor {name!r} has ones in the padding behind its {n} weights")
        count += bitmask.popcount(bits[name])
    total = sum(shape.numel() for shape in shapes.values())
    if metadata["count"] != str(count) or metadata["total"] != str(total):
        raise MaskError(
            f"{path}: metadata says {metadata['count']} of {metadata['total']} weights, "
            f"the tensors hold {count} of {total}"
        )
    if metadata["density"] != repr(count / total if total else 0.0):
        raise MaskError(f"{path}: metadata key 'density' is {metadata['density']}, the tensors hold {count} of {total}")
    tile, threshold, provenance = (_json(path, metadata, key) for key in ("tile", "threshold", "provenance"))
    if not (isinstance(tile, list) and len(tile) == 2):
        raise MaskError(f"{path}: metadata key 'tile' is not a pair")
    if not (threshold is None or (isinstance(threshold, int | float) and not isinstance(threshold, bool))):
        raise MaskError(f"{path}: metadata key 'threshold' is not a number")
    if not (isinstance(provenance, dict) and all(isinstance(value, str) for value in provenance.values())):
        raise MaskError(f"{path}: metadata key 'provenance' does not hold strings")
    return {
        "bits": {name: bits[name] for name in shapes},
        "shapes": shapes,
        "structure": metadata["structure"],
        "scope": metadata["scope"],
        "tile": tuple(tile),
        "threshold": threshold,
        "provenance": provenance,
    }
