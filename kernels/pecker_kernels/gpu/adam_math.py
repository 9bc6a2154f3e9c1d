"""Arithmetic of the Adam kernels on one block: torch's roundings, bfloat16, random bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ..dispatch import interpreted

FUSED = tl.constexpr(not interpreted())


@triton.jit
def mix(x):
    """See reference._mix; x: uint32, products wrap."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def random_key(seed, step):
    """uint32 from int64 seed and float32 step; see reference.random_bits16."""
    key = mix(step.to(tl.int64).to(tl.uint32))
    return mix(key ^ seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)


@triton.jit
def random_bits16(first, place, key):
    """uint32 below 65536 of flat index first + place; see reference.random_bits16. first: int64, place: int32 >= 0.

    The sum is taken on 32-bit halves: 64-bit lanes would need twice the registers.
    """
    low = first.to(tl.uint32) + place.to(tl.uint32)
    high = (first >> 32).to(tl.uint32) + (low < first.to(tl.uint32)).to(tl.uint32)
    return mix(mix(low ^ key) ^ high) >> 16


@triton.jit
def round_bf16(value, bits16):
    """float32 -> the bits of a bfloat16; see reference.stochastic_round_bf16."""
    raw = value.to(tl.uint32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    rounded = (raw + bits16) >> 16
    rounded = tl.where(magnitude < 0x7F800000, rounded, raw >> 16)
    return tl.where(magnitude > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def nearest_bf16(value):
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    raw = value.to(tl.uint32, bitcast=True)
    return round_bf16(value, 0x7FFF + ((raw >> 16) & 1))


@triton.jit
def fma(a, b, c):
    """a · b + c rounded once, as torch's kernels have it: where the sum cancels, a rounded product would be less accurate
    than torch by a factor. The interpreter has no such operation and takes float64 for it."""
    if FUSED:
        return tl.fma(a, b, c)
    else:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)


@triton.jit
def float32(number):
    """A float argument as a tensor: the interpreter passes Python's own floats."""
    return tl.full((), 0.0, tl.float32) + number


@triton.jit
def lerp(start, end, weight):
    """start + weight · (end - start), from the nearer end as in torch."""
    way = end - start
    return tl.where(weight < 0.5, fma(weight, way, start), fma(weight - 1, way, end))


@triton.jit
def as_float(raw):
    """float32 of a loaded value. bfloat16 is loaded as its 16 bits: the interpreter's own conversion loses subnormals
    and rounds by truncation."""
    if raw.dtype == tl.uint16:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def clamp(g, clip_value):
    """To ±clip_value; NaN stays NaN."""
    g = tl.where(g > clip_value, clip_value, g)
    return tl.where(g < -clip_value, -clip_value, g)


@triton.jit
def load_root(address, live):
    """What a root is taken of; 1 in lanes that are not live: that of 0 would take all lanes of a warp the slow way."""
    if live is None:
        return tl.load(address)
    else:
        return tl.load(address, mask=live, other=1.0)
