"""Bit masks on the GPU: weight i of a tensor (flat, row-major) is bit i & 7 of byte i >> 3, padding bits are zero."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import MaskError, PeckerKernelsError
from .registry import KernelBuild
from .table import on_device_of

# Bytes of mask per block: 4096 weights.
ROWS = 512
WARPS = 8
# Mask bytes per block of the popcount: one 16-byte load a thread.
POPCOUNT_BYTES = 4096
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bytes_moved(n: int) -> float:
    """One byte read per weight, one bit written; no floating operations. The same for unpack_bits."""
    return n + n / 8


def popcount_bytes_moved(n: int) -> float:
    """One bit read per weight; no floating operations."""
    return n / 8


def apply_bytes_moved(n: int, element_size: int) -> float:
    """Every value is read and written, whatever the mask; no floating operations."""
    return 2 * element_size * n + n / 8


# Every kernel handles full blocks apart: a mask on the addresses of a ragged end would forbid wide accesses.
@triton.jit
def _pack_block(keep, bits, first, n, ROWS: tl.constexpr, FULL: tl.constexpr):
    at = first * 8 + tl.arange(0, ROWS * 8)
    row = first + tl.arange(0, ROWS)
    if FULL:
        one = tl.load(keep + at) != 0
    else:
        one = tl.load(keep + at, mask=at < n, other=0) != 0
    ones = tl.reshape(one, [ROWS, 8]).to(tl.int32)
    byte = tl.sum(ones << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)
    if FULL:
        tl.store(bits + row, byte)
    else:
        tl.store(bits + row, byte, mask=row * 8 < n)


@triton.jit(do_not_specialize=["n"])
def pack_kernel(keep, bits, n: tl.int64, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    if (first + ROWS) * 8 <= n:
        _pack_block(keep, bits, first, n, ROWS, True)
    else:
        _pack_block(keep, bits, first, n, ROWS, False)


@triton.jit
def _byte_of(bits, row, n, FULL: tl.constexpr):
    """The bits of eight weights each, zero behind the end."""
    return tl.load(bits + row) if FULL else tl.load(bits + row, mask=row * 8 < n, other=0)


@triton.jit
def _ones_of(byte):
    """[rows] bytes -> [rows, 8] of 0 and 1, least significant bit first."""
    return (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1


@triton.jit
def _unpack_block(bits, keep, first, n, ROWS: tl.constexpr, FULL: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    at = first * 8 + tl.arange(0, ROWS * 8)
    one = tl.reshape(_ones_of(_byte_of(bits, row, n, FULL)).to(tl.uint8), [ROWS * 8])
    if FULL:
        tl.store(keep + at, one)
    else:
        tl.store(keep + at, one, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def unpack_kernel(bits, keep, n: tl.int64, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    if (first + ROWS) * 8 <= n:
        _unpack_block(bits, keep, first, n, ROWS, True)
    else:
        _unpack_block(bits, keep, first, n, ROWS, False)


@triton.jit
def _count_ones(byte):
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return tl.sum((nibbles + (nibbles >> 4)) & 0x0F, axis=0)


@triton.jit(do_not_specialize=["n_bytes"])
def popcount_kernel(bits, total, n_bytes: tl.int64, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n_bytes:
        count = _count_ones(tl.load(bits + at).to(tl.int32))
    else:
        count = _count_ones(tl.load(bits + at, mask=at < n_bytes, other=0).to(tl.int32))
    tl.atomic_add(total, count.to(tl.int64), sem="relaxed")


@triton.jit
def _apply_block(values, bits, first, n, ROWS: tl.constexpr, FULL: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = tl.load(values + at) if FULL else tl.load(values + at, mask=at < n, other=0)
    value = tl.where(_ones_of(_byte_of(bits, row, n, FULL)) != 0, value, 0)
    if FULL:
        tl.store(values + at, value)
    else:
        tl.store(values + at, value, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def apply_kernel(values, bits, n: tl.int64, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    if (first + ROWS) * 8 <= n:
        _apply_block(values, bits, first, n, ROWS, True)
    else:
        _apply_block(values, bits, first, n, ROWS, False)


def pack_bits(keep: Tensor) -> Tensor:
    """bool or uint8 [any shape] (non-zero = one) -> uint8 [ceil(n / 8)] on the same device."""
    flat = keep.detach().contiguous().view(torch.uint8)
    n = flat.numel()
    bits = torch.empty((n + 7) // 8, dtype=torch.uint8, device=keep.device)
    if n:
        with on_device_of([bits]):
            pack_kernel[(triton.cdiv(n, ROWS * 8),)](flat, bits, n, ROWS, num_warps=WARPS)
    return bits


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n] on the same device."""
    keep = torch.empty(n, dtype=torch.bool, device=bits.device)
    if n:
        with on_device_of([bits]):
            unpack_kernel[(triton.cdiv(n, ROWS * 8),)](
                bits.contiguous(), keep.view(torch.uint8), n, ROWS, num_warps=WARPS
            )
    return keep


def popcount(bits: Tensor) -> int:
    """Number of ones in uint8 [any shape]; waits for the device."""
    bits = bits.contiguous()
    total = torch.zeros(1, dtype=torch.int64, device=bits.device)
    if bits.numel():
        grid = (triton.cdiv(bits.numel(), POPCOUNT_BYTES),)
        with on_device_of([bits]):
            popcount_kernel[grid](bits, total, bits.numel(), POPCOUNT_BYTES, num_warps=WARPS)
    return int(total)


def apply_(tensor: Tensor, bits: Tensor) -> Tensor:
    """t ⊙ m in place: masked-out elements become exactly +0, NaN included; the others keep their bits.

    tensor: contiguous, 2, 4 or 8 bytes an element. bits: uint8 [ceil(n / 8)] on the same device. Raises
    PeckerKernelsError for other layouts and element sizes, MaskError for bits on another device.
    """
    if not tensor.is_contiguous() or tensor.element_size() not in _INTEGERS:
        raise PeckerKernelsError(f"the Triton apply takes contiguous 2, 4 or 8 byte floats, got {tensor.dtype} strided")
    if bits.device != tensor.device:
        raise MaskError(f"the mask is on {bits.device}, the tensor on {tensor.device}")
    n = tensor.numel()
    if n:
        values = tensor.detach().view(-1).view(_INTEGERS[tensor.element_size()])
        grid = (triton.cdiv(n, ROWS * 8),)
        with on_device_of([tensor]):
            apply_kernel[grid](values, bits.contiguous(), n, ROWS, num_warps=WARPS)
        # The write happened behind autograd's back.
        torch.autograd.graph.increment_version(tensor)
    return tensor


COMPILE = [
    KernelBuild("pack", pack_kernel, {"keep": "*u8", "bits": "*u8", "n": "i64"}, {"ROWS": ROWS}, WARPS, 128, 16),
    KernelBuild("unpack", unpack_kernel, {"bits": "*u8", "keep": "*u8", "n": "i64"}, {"ROWS": ROWS}, WARPS, 8, 128),
    KernelBuild(
        "popcount",
        popcount_kernel,
        {"bits": "*u8", "total": "*i64", "n_bytes": "i64"},
        {"BLOCK": POPCOUNT_BYTES},
        WARPS,
        128,
        0,
    ),
    *(
        KernelBuild(
            f"apply_{8 * size}bit",
            apply_kernel,
            {"values": f"*i{8 * size}", "bits": "*u8", "n": "i64"},
            {"ROWS": ROWS},
            WARPS,
            128,
            128,
        )
        for size in _INTEGERS
    ),
]
