"""sha256 of files and of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pecker_fast.errors import DataError, PeckerError
from pecker_fast.files.reading import reason_of, size_of

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hex sha256 over name, dtype, shape and bytes of each tensor, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes of all tensors, by name. Of a UNet's tensors as they are stored, under
    diffusers' names, it is what `base_sha256` and `weights_sha256` mean wherever they are written."""
    return sha256_tensors(sorted(tensors.items()))


def sha256_file(path: str | Path, *, error: type[PeckerError] = DataError) -> str:
    """Hex sha256 of a file's bytes; raises `error` when it cannot be read."""
    size_of(Path(path), "file", error)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason_of(reason)}") from None
