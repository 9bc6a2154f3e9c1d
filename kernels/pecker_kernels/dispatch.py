"""Which implementation serves a call: "auto" | "triton" | "cpu" | "reference".

"auto" takes Triton for CUDA tensors, C++ for CPU tensors and torch where neither can serve; a named implementation is
used or PeckerKernelsError is raised.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

from torch import Tensor

from . import native
from .errors import PeckerKernelsError

IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference")


@functools.cache
def triton_available() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors; read by triton when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_takes(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can take these tensors."""
    devices = [t.device.type for t in tensors]
    return triton_available() and all(kind == "cuda" or (kind == "cpu" and interpreted()) for kind in devices)


def why_not_triton(*tensors: Tensor) -> str:
    """Why `triton_takes` says no, to follow "impl='triton'"."""
    if not triton_available():
        return "needs triton, which is not installed"
    where = sorted({str(t.device) for t in tensors})
    return f"takes CUDA tensors, got {', '.join(where)} (CPU tensors only in the interpreter, TRITON_INTERPRET=1)"


def triton_kernels(name: str) -> Any:
    """The module gpu/NAME.py, imported by the first call that needs it: triton is only there where a GPU is.

    By name, because the kernels look at what they carry out (jobs of Adam, histograms of scores) and stand right of it.
    """
    return importlib.import_module(f".gpu.{name}", __package__)


def check_impl(impl: str, *, built: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """Return `impl`; raise PeckerKernelsError for an unknown name or one the operation does not have."""
    if impl not in IMPLEMENTATIONS:
        raise PeckerKernelsError(f"unknown implementation impl={impl!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    if impl not in built:
        raise PeckerKernelsError(f"impl={impl!r} is not available for this operation: choose from {', '.join(built)}")
    return impl


def resolve(impl: str, *tensors: Tensor, built: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """ "triton", "cpu" or "reference" for a call on these tensors.

    A named implementation comes back as it is, whether or not it can take the tensors: its own door then says what it
    misses. built: the implementations this operation has.
    """
    check_impl(impl, built=built)
    if impl == "triton" and not triton_takes(*tensors):
        raise PeckerKernelsError(f"impl='triton' {why_not_triton(*tensors)}")
    if impl != "auto":
        return impl
    if "cpu" in built and all(t.device.type == "cpu" for t in tensors) and native.available():
        return "cpu"
    if "triton" in built and all(t.device.type == "cuda" for t in tensors) and triton_takes(*tensors):
        return "triton"
    return "reference"
