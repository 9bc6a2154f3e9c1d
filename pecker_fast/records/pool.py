"""The pool of a run in its folder: read back by a run that goes on, and drawn again where it is not what was written."""

from pathlib import Path

import torch

from pecker_fast import files
from pecker_fast.errors import PeckerError
from pecker_fast.forgetting import Pool

SHA256 = "sha256"


def keep_pool(pool: Pool, path: Path) -> None:
    """Write a pool as a whole file. Raises OutputError."""
    tensors = {name: tensor.detach().cpu() for name, tensor in pool.tensors().items()}
    files.write_tensors(path, tensors, {SHA256: files.sha256_tensors(sorted(tensors.items()))})


def kept_pool(path: Path, device: torch.device) -> Pool | None:
    """The pool of `keep_pool`; None where there is none, or it has been changed."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = files.read_tensors(path)
        whole = metadata.get(SHA256) == files.sha256_tensors(sorted(tensors.items()))
        return Pool.of(tensors, device) if whole else None
    except (PeckerError, KeyError):
        return None
