"""The Triton kernels, one family of operations per file. Nothing here is imported before a call asks for it: triton is
only there where a GPU is."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


@functools.cache
def available() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors; read by triton when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors."""
    return available() and all(t.device.type == "cuda" or (t.device.type == "cpu" and interpreted()) for t in tensors)


def missing(*tensors: Tensor) -> str:
    """Why `runs_on` says no, to follow "impl='triton'"."""
    if not available():
        return "needs triton, which is not installed"
    where = sorted({str(t.device) for t in tensors})
    return f"takes CUDA tensors, got {', '.join(where)} (CPU tensors only in the interpreter, TRITON_INTERPRET=1)"
