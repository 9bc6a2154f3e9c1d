"""Which implementation serves a call: "auto" | "triton" | "cpu" | "reference".

"auto" takes Triton for CUDA tensors, C++ for CPU tensors and torch where neither can serve; a named implementation is
used or PeckerKernelsError is raised.
"""

from __future__ import annotations

from torch import Tensor

from . import gpu, native
from .errors import PeckerKernelsError

IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference")


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
    if impl == "triton" and not gpu.runs_on(*tensors):
        raise PeckerKernelsError(f"impl='triton' {gpu.missing(*tensors)}")
    if impl != "auto":
        return impl
    if "cpu" in built and all(t.device.type == "cpu" for t in tensors) and native.available():
        return "cpu"
    if "triton" in built and all(t.device.type == "cuda" for t in tensors) and gpu.runs_on(*tensors):
        return "triton"
    return "reference"
