"""Live tiles of one weight, cut from its view [shape[0], rest], and where their gradients lie in the compact vector.

The live tiles of one tile row are a strip. In row-major order of the weights the lanes of a strip are one block
[rows, w], w the width of its live tiles together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import choice, to_device


@dataclass(frozen=True)
class Strip:
    """rows: of the weight's view. inputs: input features or channels that its live tiles touch. columns: where the live
    ones lie among the columns of those inputs. All ascending, a slice where there is no gap."""

    rows: slice
    inputs: slice | Tensor
    columns: slice | Tensor


@dataclass(frozen=True)
class Tiles:
    """strips: in lane order, neighbours with the same columns as one. table: int64 [tiles, 4] on the weight's device:
    first row, first column, first lane, lanes a row. count: lanes. tile: height and width, edges ragged."""

    strips: tuple[Strip, ...]
    table: Tensor
    count: int
    tile: tuple[int, int]


def corners(keep: Tensor, tile: tuple[int, int]) -> Tensor | None:
    """bool [rows, columns] -> bool [tiles down, tiles across]; None where a tile is neither live nor dead as a whole."""
    height, width = tile
    live = keep[::height, ::width]
    spread = live.repeat_interleave(height, 0)[: keep.shape[0]].repeat_interleave(width, 1)[:, : keep.shape[1]]
    return live if torch.equal(spread, keep) else None


def plan_tiles(live: Tensor, shape: tuple[int, int], tile: tuple[int, int], taps: int, device: torch.device) -> Tiles:
    """live: bool [tiles down, tiles across] of a weight [rows, columns]. taps: columns of one input, 1 or the kernel's
    size. Waits for the device."""
    (height, width), (rows, columns) = tile, shape
    table: list[tuple[int, int, int, int]] = []
    strips: list[tuple[slice, list[int]]] = []
    lane = 0
    for i, kept in enumerate(live.tolist()):
        lefts = [j * width for j, one in enumerate(kept) if one]
        if not lefts:
            continue
        top, bottom = i * height, min((i + 1) * height, rows)
        wide = sum(min(left + width, columns) - left for left in lefts)
        table += [(top, left, lane + k * width, wide) for k, left in enumerate(lefts)]
        lane += (bottom - top) * wide
        if strips and strips[-1][1] == lefts and strips[-1][0].stop == top:
            strips[-1] = (slice(strips[-1][0].start, bottom), lefts)
        else:
            strips.append((slice(top, bottom), lefts))
    made = []
    for where, lefts in strips:
        positions = torch.cat([torch.arange(left, min(left + width, columns)) for left in lefts])
        made.append(Strip(where, *(to_device(part, device) for part in inputs_of(positions, taps))))
    return Tiles(tuple(made), torch.tensor(table, dtype=torch.int64).view(-1, 4).to(device), lane, tile)


def inputs_of(columns: Tensor, taps: int) -> tuple[slice | Tensor, slice | Tensor]:
    """(inputs, columns) of Strip for columns of the weight's view, int64 ascending."""
    inputs, rank = torch.unique(columns // taps, return_inverse=True)
    return choice(inputs), choice(rank * taps + columns % taps)
