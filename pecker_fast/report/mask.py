"""Where a mask lets the forget gradient through: a table, layer by layer and block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

MOST_BLOCKS = 60  # shown one by one


class Mask(Protocol):
    """What is read of a `pecker_kernels.SaliencyMask`."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def shapes(self) -> Mapping[str, Sequence[int]]: ...
    @property
    def density(self) -> float: ...
    @property
    def count(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def structure(self) -> str: ...
    def density_of(self, name: str) -> float: ...


class MaskRow(NamedTuple):
    """One tensor: its name, shape, number of weights, how many the mask keeps, and their share."""

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    density: float


def mask_table(mask: Mask) -> list[MaskRow]:
    """One row a tensor, in the order of the model."""
    rows = []
    for name in mask.names:
        shape = tuple(int(n) for n in mask.shapes[name])
        weights, density = math.prod(shape), float(mask.density_of(name))
        rows.append(MaskRow(name, shape, weights, round(density * weights), density))
    return rows


def by_block(rows: Sequence[MaskRow]) -> list[MaskRow]:
    """The rows added up by the part of the network they belong to: `down_blocks.0`, `mid_block`, `conv_in`, ..."""
    blocks: dict[str, list[int]] = {}
    for row in rows:
        parts = row.name.split(".")
        key = ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]
        total = blocks.setdefault(key, [0, 0])
        total[0] += row.weights
        total[1] += row.kept
    found = [MaskRow(key, (), n, kept, kept / n if n else 0.0) for key, (n, kept) in blocks.items()]
    if len(found) <= MOST_BLOCKS:
        return found
    found, rest = found[:MOST_BLOCKS], found[MOST_BLOCKS:]
    n, kept = sum(row.weights for row in rest), sum(row.kept for row in rest)
    return [*found, MaskRow(f"{len(rest)} more", (), n, kept, kept / n if n else 0.0)]
