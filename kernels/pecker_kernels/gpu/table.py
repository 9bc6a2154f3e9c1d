"""One launch over many tensors: which block works on which part of which tensor, and where the tensors are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Table:
    """chunks: int32 [blocks, 2], (tensor, block within it). first: int64 [tensors + 1], each tensor's first block.
    rows: int64 [tensors, columns + 2], an address per column, the number of values and the tensor's place in the
    caller's list. aligned: every address is a multiple of 16."""

    chunks: Tensor
    first: Tensor
    rows: Tensor
    aligned: bool

    @property
    def grid(self) -> tuple[int]:
        return (self.chunks.shape[0],)


def on_device_of(tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(tensors[0].device) if tensors and tensors[0].is_cuda else nullcontext()


def table(columns: Sequence[Sequence[Tensor]], block: int, slots: Sequence[int] | None = None) -> Table:
    """columns: one list of contiguous tensors per operand, the first of which gives the sizes; empty ones get no block.

    Nothing is copied to the device when the same addresses come again: a captured graph stays valid.
    """
    first = columns[0]
    device = first[0].device
    sizes = tuple(t.numel() for t in first)
    addresses = tuple(tuple(c[i].data_ptr() for c in columns) for i in range(len(first)))
    places = tuple(range(len(first)) if slots is None else slots)
    # Never dereferenced for empty tensors, whose address is 0.
    aligned = all(address % 16 == 0 for row in addresses for address in row)
    return Table(*_chunks(sizes, block, device), _rows(addresses, sizes, places, device), aligned)


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(chunks, first) of Table."""
    blocks = torch.tensor([0, *(triton.cdiv(n, block) for n in sizes)], dtype=torch.int64)
    first = blocks.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), blocks[1:])
    within = torch.arange(len(owner)) - first[owner]
    return upload(torch.stack([owner, within], dim=1).to(torch.int32), device), upload(first, device)


@functools.lru_cache(maxsize=64)
def _rows(
    addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], slots: tuple[int, ...], device: torch.device
) -> Tensor:
    rows = [(*address, n, slot) for address, n, slot in zip(addresses, sizes, slots)]
    return upload(torch.tensor(rows, dtype=torch.int64), device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without a wait for it: out of pageable memory a copy would be one."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


@triton.jit
def block_start(chunks, BLOCK: tl.constexpr):
    """(tensor, flat index of the block's first value): int64, for tensors of more than 2**31 values."""
    here = chunks + 2 * tl.program_id(0).to(tl.int64)
    return tl.load(here), tl.load(here + 1).to(tl.int64) * BLOCK


@triton.jit
def pointer(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The hint must be true: the interpreter does not check it, a GPU faults on it."""
    here = tl.load(address).to(tl.pointer_type(KIND))
    if ALIGNED:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def values_left(start, n, BLOCK: tl.constexpr):
    """How many of the block's lanes hold a value, int32: offsets inside a block need no more."""
    return tl.minimum(n - start, BLOCK).to(tl.int32)


@triton.jit
def load_block(here, start, left, BLOCK: tl.constexpr):
    """BLOCK values from `start`, 0 behind the end. A mask over a full block would forbid wide loads."""
    lane = tl.arange(0, BLOCK)
    here += start
    if left == BLOCK:
        value = tl.load(here + lane)
    else:
        value = tl.load(here + lane, mask=lane < left, other=0)
    return value


@triton.jit
def store_block(here, start, left, value, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    here += start
    if left == BLOCK:
        tl.store(here + lane, value)
    else:
        tl.store(here + lane, value, mask=lane < left)


@triton.jit
def load_bits(address, start, left, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The block's values as int32 patterns of float32; integers all the way, so that no denormal is flushed."""
    if tl.float32 == KIND:
        return load_block(pointer(address, tl.int32, ALIGNED), start, left, BLOCK)
    elif tl.bfloat16 == KIND:
        return load_block(pointer(address, tl.int16, ALIGNED), start, left, BLOCK).to(tl.int32) << 16
    else:
        half = load_block(pointer(address, tl.float16, ALIGNED), start, left, BLOCK)
        return half.to(tl.float32).to(tl.int32, bitcast=True)
