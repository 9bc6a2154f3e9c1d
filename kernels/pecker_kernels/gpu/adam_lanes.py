"""Which lanes of a tensor an Adam kernel visits: chunk tables, built once per mask, and how a kernel reads its chunk.

Three kinds. WHOLE: every position. BITMAP: the mask's bits, ranks by a prefix count per chunk and a scan inside it; only
chunks with a live lane are listed, so that dead rows and tiles cost nothing. INDEX: sorted 16-bit positions inside tiles
of TILE weights, for masks that would leave most of a bitmap chunk idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..dispatch import interpreted

# The interpreter runs block after block in Python: small blocks keep several of them in small tests.
BLOCK = 64 if interpreted() else 1024
TILE = 256 if interpreted() else 1 << 16
WARPS = 4
# Share of live lanes in the live chunks below which a list is taken. A step is bound by instructions: a bitmap takes 1,055 of
# sm_90's for eight positions, a list 771 for eight live lanes, even at .73. Not measured on a GPU.
INDEX_BELOW = 0.6

WHOLE = tl.constexpr(0)
BITMAP = tl.constexpr(1)
INDEX = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class LaneTable:
    """The chunks of one tensor. chunks: int64 [C, 3] of first position (of the chunk, or of its tile), rank of the first
    lane, and positions (WHOLE, BITMAP) or lanes (INDEX) in the chunk. lanes: weights that are updated. ones: those
    that the mask keeps. source: what the kernel reads them from, the uint8 bits or the int16 list (two's complement of the
    16-bit positions)."""

    kind: int
    chunks: Tensor
    lanes: int
    ones: int
    source: Tensor | None


def whole_table(n: int, device: torch.device, block: int = BLOCK) -> LaneTable:
    """All n positions, in chunks of `block`."""
    first = torch.arange(0, n, block, device=device)
    return LaneTable(WHOLE.value, torch.stack([first, first, (n - first).clamp_(max=block)], dim=1), n, n, None)


def _counts(bits: Tensor, block: int) -> Tensor:
    """int64: ones in each block of positions."""
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % (block // 8))).view(-1, block // 8)
    pairs = padded - ((padded >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)


def ranked_table(bits: Tensor, n: int, block: int = BLOCK) -> LaneTable:
    """All n positions, in chunks of `block` that know how many of the ones in uint8 [ceil(n / 8)] bits lie before them;
    waits for the device."""
    chunks, counts = whole_table(n, bits.device, block).chunks, _counts(bits, block)
    chunks[:, 1] = counts.cumsum(0) - counts
    return LaneTable(WHOLE.value, chunks, n, int(counts.sum()), None)


def masked_table(bits: Tensor, n: int, block: int = BLOCK, tile: int = TILE) -> LaneTable:
    """The ones of uint8 [ceil(n / 8)] bits, as a bitmap or as lists, whichever suits their density; waits for the
    device."""
    counts = _counts(bits, block)
    live = counts.nonzero().view(-1)
    lanes = int(counts.sum())
    if lanes == n:
        return whole_table(n, bits.device, block)
    if lanes < INDEX_BELOW * block * live.numel():
        return index_table(bits, n, block, tile)
    first = live * block
    chunks = torch.stack([first, (counts.cumsum(0) - counts)[live], (n - first).clamp_(max=block)], dim=1)
    return LaneTable(BITMAP.value, chunks, lanes, lanes, bits)


def index_table(bits: Tensor, n: int, block: int = BLOCK, tile: int = TILE) -> LaneTable:
    """The ones as sorted positions inside tiles; chunks of up to `block` lanes, none across two tiles."""
    position = reference.unpack_bits(bits, n).nonzero().view(-1)
    tiles = torch.arange(0, n + tile, tile, device=bits.device)
    rank = torch.searchsorted(position, tiles)  # of each tile's first lane
    count = rank.diff()
    pieces = (count + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(count.numel(), device=bits.device), pieces)
    before = (torch.arange(owner.numel(), device=bits.device) - (pieces.cumsum(0) - pieces)[owner]) * block
    chunks = torch.stack([tiles[owner], rank[owner] + before, (count[owner] - before).clamp_(max=block)], dim=1)
    return LaneTable(INDEX.value, chunks, position.numel(), position.numel(), (position % tile).to(torch.int16))


@triton.jit
def lanes_of(source, first, rank, count, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """(place, row, live) int32, int32, bool [BLOCK] of a BITMAP or INDEX chunk: position - first, rank - first rank."""
    at = tl.arange(0, BLOCK)
    inside = at < count
    if LANES == INDEX:
        place = tl.load(source + rank + at, mask=inside, other=0).to(tl.int32)
        return place, at, inside
    else:
        byte = tl.load(source + first // 8 + at // 8, mask=inside, other=0).to(tl.int32)
        one = (byte >> (at % 8)) & 1
        return at, tl.cumsum(one, 0) - one, one != 0
