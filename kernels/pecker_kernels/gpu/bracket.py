"""A selection's bracket on the GPU: a sample of the keys says between which two of them the k-th largest lies, one pass counts
what is above and collects what is between. Keys and samples are those of scores.backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registry import KernelBuild
from .table import TRITON_TYPES, block_start, pointer, table, values_left
from .threshold import BLOCK, WARPS, by_dtype, faults_of

SAMPLED_BLOCKS = 64  # of which one program takes its samples
# Parts of the pool that fill by counters of their own: a thread of each block adds to one, so that few meet at an address.
REGIONS = 64
_LINE = tl.constexpr(32)  # int32 from one counter to the next: a cache line each


def bracket_bytes_moved(n: int, element_size: int, pooled: int) -> float:
    """Every score is read once, the pool written; no floating operations."""
    return element_size * n + 4 * pooled


@triton.constexpr_function
def _stored(kind):
    """As what a value is loaded: integers, so that no denormal is flushed, where its bits are those of a float32."""
    return {tl.float32: tl.int32, tl.bfloat16: tl.int16, tl.float16: tl.float16}[kind]


@triton.jit
def _patterns(value, KIND: tl.constexpr):
    """float32 patterns, int32, of what was loaded as `_stored(KIND)`."""
    if tl.float32 == KIND:
        return value
    elif tl.bfloat16 == KIND:
        return value.to(tl.int32) << 16
    else:
        return value.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _hashed(x):
    """uint32 -> uint32: every bit of x moves half of the bits of the result."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def sample_kernel(
    chunks, rows, keys, blocks,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """keys[block · PER + j]: one key of each of PER equal stretches of every block, at a hashed place; -1 behind the end."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    here = block < blocks
    tensor = tl.load(chunks + 2 * block, mask=here, other=0)
    within = tl.load(chunks + 2 * block + 1, mask=here, other=0)
    row = rows + 3 * tensor
    start = within.to(tl.int64) * BLOCK
    j = tl.arange(0, PER)[None, :]
    stretch: tl.constexpr = BLOCK // PER
    seed = tl.load(row + 2).to(tl.uint32) * tl.full((), 0x9E3779B1, tl.uint32) + (within * PER + j).to(tl.uint32)
    at = start + j * stretch + (_hashed(seed) % stretch).to(tl.int32)
    live = here & (at < tl.load(row + 1))
    raw = _patterns(tl.load(tl.load(row).to(tl.pointer_type(_stored(KIND))) + at, mask=live, other=0), KIND)
    tl.store(keys + block.to(tl.int64) * PER + j, tl.where(live, raw & 0x7FFFFFFF, -1), mask=here)


@triton.jit
def _sum_and_max(a, b, c, d):
    return a + c, tl.maximum(b, d)


@triton.jit(do_not_specialize=["capacity"])
def bracket_kernel(
    chunks, rows, bounds, above, filled, pool, faults, capacity: tl.int32,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, REGIONS: tl.constexpr,
):  # fmt: skip
    """above += keys above bounds[1]; filled[r, 0] += keys of region r from bounds[0] to bounds[1], of which the first `capacity` to
    come are stored in pool[r]."""
    tensor, start = block_start(chunks, BLOCK)
    row = rows + 3 * tensor
    left = values_left(start, tl.load(row + 1), BLOCK)
    # [waves, THREADS]: a thread's values along the first axis, so that sums along it stay in its registers
    at = tl.arange(0, BLOCK // THREADS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    # One value at a time: what takes several at once into a thread would be dealt out anew for the atomics below.
    values = pointer(row, _stored(KIND), False) + start + at
    if left == BLOCK:
        raw = _patterns(tl.load(values), KIND)
        key = raw & 0x7FFFFFFF
    else:
        raw = _patterns(tl.load(values, mask=at < left, other=0), KIND)
        key = tl.where(at < left, raw & 0x7FFFFFFF, -1)
    lower = tl.load(bounds)
    width = tl.load(bounds + 1) - lower
    over = key - lower  # negative for what lies below: bounds are ≥ 0, keys ≥ -1
    inside = over.to(tl.uint32, bitcast=True) <= width.to(tl.uint32, bitcast=True)
    most = tl.max((key if MAGNITUDE else raw).to(tl.uint32, bitcast=True), axis=0)
    higher, most = tl.reduce((tl.sum((over > width).to(tl.int32), axis=0), most), 0, _sum_and_max)
    # inf, NaN and what lies below zero are the largest as unsigned numbers, and so is what is behind the end
    if most >= 0x7F800000:
        bad = faults_of(tl.ravel(raw), tl.ravel(at < left), MAGNITUDE)
        tl.atomic_or(faults + tl.load(row + 2), bad, mask=bad != 0, sem="relaxed")
    tl.atomic_add(above, higher.to(tl.int64), mask=higher > 0, sem="relaxed")
    # Another region in the next block: whatever pattern the data have, regions fill alike. The order of the pool is open.
    region = (tl.program_id(0) * 29 + tl.arange(0, THREADS))[None, :] % REGIONS
    place = tl.atomic_add(filled + _LINE * region + tl.zeros_like(key), 1, mask=inside, sem="relaxed")
    tl.store(pool + (region * capacity + place), key, mask=inside & (place < capacity))


def sample(tensors: Sequence[Tensor], per: int) -> Tensor:
    """See scores.backend; contiguous tensors, not all empty."""
    found = []
    for dtype, group in by_dtype(tensors):
        launch = table([[tensors[i] for i in group]], BLOCK, group)
        blocks = launch.grid[0]
        keys = torch.empty(blocks * per, dtype=torch.int32, device=launch.chunks.device)
        sample_kernel[(triton.cdiv(blocks, SAMPLED_BLOCKS),)](
            launch.chunks, launch.rows, keys, blocks, TRITON_TYPES[dtype], per, BLOCK, SAMPLED_BLOCKS, num_warps=WARPS
        )
        found.append(keys)
    return torch.cat(found)


def bracket(
    tensors: Sequence[Tensor], magnitude: bool, bounds: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(above: int64 [1], filled: int32 [REGIONS], pool: int32 [REGIONS, at least capacity / REGIONS], int32 faults) of contiguous
    tensors, not all empty. Of a region more may be counted than it could take."""
    device = tensors[0].device
    above = torch.zeros(1, dtype=torch.int64, device=device)
    filled = torch.zeros(REGIONS, _LINE.value, dtype=torch.int32, device=device)
    faults = torch.zeros(len(tensors), dtype=torch.int32, device=device)
    pool = torch.empty(REGIONS, 4 * triton.cdiv(capacity, 4 * REGIONS), dtype=torch.int32, device=device)
    for dtype, group in by_dtype(tensors):
        launch = table([[tensors[i] for i in group]], BLOCK, group)
        bracket_kernel[launch.grid](
            launch.chunks, launch.rows, bounds, above, filled, pool, faults, pool.shape[1],
            TRITON_TYPES[dtype], magnitude, BLOCK, min(32 * WARPS, BLOCK), REGIONS, num_warps=WARPS,
        )  # fmt: skip
    return above, filled[:, 0], pool, faults


_TABLES = {"chunks": "*i32", "rows": "*i64"}
_BRACKET = {
    **_TABLES, "bounds": "*i32", "above": "*i64", "filled": "*i32", "pool": "*i32", "faults": "*i32", "capacity": "i32",
}  # fmt: skip
COMPILE = [
    *(
        KernelBuild(
            f"bracket_{kind}{'_magnitude' if magnitude else ''}",
            bracket_kernel,
            _BRACKET,
            {"KIND": kind, "MAGNITUDE": magnitude, "BLOCK": BLOCK, "THREADS": 32 * WARPS, "REGIONS": REGIONS},
            WARPS,
            scalar=True,
        )
        for kind, magnitude in ((tl.float32, False), (tl.float32, True), (tl.bfloat16, False), (tl.float16, False))
    ),
    *(
        KernelBuild(
            f"sample_{kind}_{per}",
            sample_kernel,
            {**_TABLES, "keys": "*i32", "blocks": "i32"},
            {"KIND": kind, "PER": per, "BLOCK": BLOCK, "BLOCKS": SAMPLED_BLOCKS},
            WARPS,
        )
        for kind, per in ((tl.float32, 4), (tl.bfloat16, 4), (tl.float16, 4), (tl.float32, 256))
    ),
]
