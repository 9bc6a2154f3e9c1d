"""Bit masks as uint8 tensors: pack, unpack, popcount, union, intersection, apply; each chooses an implementation by
name (see dispatch.resolve)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import native, reference
from ..dispatch import resolve, triton_kernels
from ..errors import MaskError

BUILT = ("auto", "triton", "cpu", "reference")


def _kernels(impl: str) -> ModuleType:
    """The module of a resolved implementation."""
    if impl == "triton":
        return triton_kernels("bits")
    return native if impl == "cpu" else reference


def check_bits(bits: Tensor, n: int, what: str = "bits") -> None:
    """Raise MaskError unless `bits` is uint8 [ceil(n / 8)]."""
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != (n + 7) // 8:
        raise MaskError(f"{what}: expected uint8 [{(n + 7) // 8}] for {n} weights, got {bits.dtype} {list(bits.shape)}")


def sound_bits(bits: Tensor, n: int, what: str = "bits") -> Tensor:
    """The bits in one piece, for kernels that walk them. Raises MaskError where `check_bits` does and for ones in the
    padding; waits for the device."""
    check_bits(bits, n, what)
    if n % 8 and int(bits[-1]) >> (n % 8):
        raise MaskError(f"{what} has ones in the padding behind its {n} weights")
    return bits.contiguous()


def pack_bits(keep: Tensor, impl: str = "auto") -> Tensor:
    """bool or uint8 [any shape] (non-zero = one) -> uint8 [ceil(n / 8)] on the same device, least significant bit
    first."""
    if keep.dtype not in (torch.bool, torch.uint8):
        raise MaskError(f"only bool and uint8 tensors can be packed, got {keep.dtype}")
    return _kernels(resolve(impl, keep, built=BUILT)).pack_bits(keep)


def unpack_bits(bits: Tensor, n: int, impl: str = "auto") -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    check_bits(bits, n)
    return _kernels(resolve(impl, bits, built=BUILT)).unpack_bits(bits, n)


def popcount(bits: Tensor, impl: str = "auto") -> int:
    """Number of ones in a uint8 tensor; waits for the device."""
    if bits.dtype != torch.uint8:
        raise MaskError(f"popcount takes uint8 bits, got {bits.dtype}")
    return _kernels(resolve(impl, bits, built=BUILT)).popcount(bits)


def apply_(tensor: Tensor, bits: Tensor, impl: str = "auto") -> Tensor:
    """t ⊙ m in place for floating tensors: masked-out elements become exactly +0, the others keep their bits."""
    if not tensor.is_floating_point():
        raise MaskError(f"a mask applies to floating tensors, got {tensor.dtype}")
    check_bits(bits, tensor.numel())
    served = tensor.is_contiguous() and tensor.element_size() in (2, 4, 8)
    with torch.no_grad():
        chosen = resolve(impl, tensor, bits, built=BUILT)
        if chosen == "reference" or not (served or impl == chosen):
            return reference.apply_(tensor, bits.to(tensor.device))
        return _kernels(chosen).apply_(tensor, bits)


def union(a: Tensor, b: Tensor) -> Tensor:
    """Weights kept by either mask."""
    return a | b


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Weights kept by both masks."""
    return a & b


def full_bits(n: int, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [ceil(n / 8)] of ones, padding zero."""
    bits = torch.full(((n + 7) // 8,), 255, dtype=torch.uint8, device=device)
    if n % 8:
        bits[-1] = (1 << n % 8) - 1
    return bits


def kept_indices(bits: Tensor, n: int) -> Tensor:
    """int64 [popcount] flat positions of the ones, ascending."""
    return unpack_bits(bits, n).nonzero().view(-1)
