"""Kernels with one mistake each, for the gates of bench/triton_kernels.py."""

import triton
import triton.language as tl
from pecker_kernels.gpu.registry import KernelBuild


@triton.jit
def spilling_kernel(x, out, SIDE: tl.constexpr):
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    a = tl.load(x + row * SIDE + column)
    b = tl.load(x + SIDE * SIDE + row * SIDE + column)
    tl.store(out + row * SIDE + column, (a * tl.sum(b) + b * tl.sum(a)) / tl.max(a + b))


@triton.jit
def narrow_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def hopeful_kernel(addresses, BLOCK: tl.constexpr):
    x = tl.multiple_of(tl.load(addresses).to(tl.pointer_type(tl.float32)), 16) + tl.arange(0, BLOCK)
    tl.store(x, tl.load(x) + 1)


@triton.jit
def wrong_kernel(x, out):
    tl.store(out, tl.load(x) @ tl.load(x))


POINTERS = {"x": "*fp32", "out": "*fp32"}
spills = [KernelBuild("spilling", spilling_kernel, POINTERS, {"SIDE": 256}, 4)]
narrow = [KernelBuild("narrow", narrow_kernel, {**POINTERS, "n": "i32"}, {"BLOCK": 1024}, 4, 128, 128)]
hopeful = [KernelBuild("hopeful", hopeful_kernel, {"addresses": "*i64"}, {"BLOCK": 1024}, 4, scalar=True)]
wrong = [KernelBuild("wrong", wrong_kernel, POINTERS, {}, 4)]
