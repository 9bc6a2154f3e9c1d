"""What each layer computes of its weight gradient, decided once from the mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adam.lanes import Lanes
from ..dispatch import triton_takes, why_not_triton
from ..errors import PeckerKernelsError
from ..mask import bits as bitmask
from ..mask.saliency import SaliencyMask
from .conv import Convolution
from .linear import Linear
from .rows import choice, live_rows, to_device
from .tiles import Tiles, corners, plan_tiles

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Below this a tile is no work for a matrix unit: rows are computed whole and lanes gathered.
SMALLEST_TILE = 16


@dataclass(frozen=True)
class Part:
    """What of one parameter's gradient is computed.

    mode: "dense" | "rows" | "tiles" | "dead". rows: live ones ("rows"). tiles: live ones ("tiles"). lanes: where the live
    weights lie in what is computed ("rows"). shape: of the gradient that autograd carries.
    """

    mode: str
    shape: tuple[int, ...] = ()
    rows: slice | Tensor | None = None
    tiles: Tiles | None = None
    lanes: Lanes | None = None


def servable(module: nn.Module) -> bool:
    """Whether the layer's products are known here: a plain linear layer or convolution with its class's own forward."""
    forward = vars(module).get("forward", module.forward)  # a copy of a module may hold its own one
    if getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module:
        return False
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False
    if module.weight.is_complex():
        return False
    if type(module) is nn.Linear:
        return True
    return type(module) in CONVOLUTIONS and module.groups == 1 and module.padding_mode == "zeros"


def products_of(module: nn.Module, triton: bool) -> Linear | Convolution:
    return Linear(triton) if type(module) is nn.Linear else Convolution(module)


def triton_refuses(weight: Tensor, tile: tuple[int, int]) -> str | None:
    """Why the grouped product cannot serve the weight, to follow "impl='triton'"; None where it can."""
    if not triton_takes(weight):
        return why_not_triton(weight)
    if min(tile) < SMALLEST_TILE:
        return f"takes tiles from {SMALLEST_TILE}x{SMALLEST_TILE} on, got {tile[0]}x{tile[1]}"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16 weights, got {weight.dtype}"
    return None


def uses_triton(module: nn.Module, mask: SaliencyMask, impl: str) -> bool:
    """Whether tiles of a linear layer are Triton's; rows and convolutions are the library's under every name. Raises
    PeckerKernelsError where impl="triton" cannot be honoured."""
    if type(module) is not nn.Linear or mask.structure != "tile" or impl == "reference":
        return False
    complaint = triton_refuses(module.weight, mask.tile)
    if complaint and impl == "triton":
        raise PeckerKernelsError(f"impl='triton' {complaint}")
    return complaint is None


def plan_weight(weight: Tensor, mask: SaliencyMask, name: str, tiled: bool) -> Part:
    """The part of a weight [out, in, *kernel] called `name` in the mask; tiled: by tiles where its bits are tiles. Waits
    for the device."""
    keep = mask.bool(name)
    count = int(keep.sum())
    if count in (0, weight.numel()):
        return Part("dense" if count else "dead")
    keep = keep.view(weight.shape[0], -1)
    if tiled and mask.structure == "tile":
        live = corners(keep, mask.tile)
        if live is not None:
            shape, taps = (keep.shape[0], keep.shape[1]), weight.shape[2:].numel()
            return Part("tiles", (count,), tiles=plan_tiles(live, shape, mask.tile, taps, weight.device))
    rows = live_rows(keep)
    if rows.numel() == weight.shape[0]:
        return Part("dense")
    within = keep.index_select(0, rows)
    shape_of_rows = (rows.numel(), *weight.shape[1:])
    bits = None if count == within.numel() else bitmask.pack_bits(within).to(weight.device)
    lanes = Lanes(shape_of_rows, bits)
    return Part("rows", shape_of_rows, to_device(choice(rows), weight.device), lanes=lanes)


def plan_bias(bias: Tensor, mask: SaliencyMask, name: str) -> Part:
    """A bias [out] is summed whole and its live values are taken."""
    live = mask.indices(name)
    count = live.numel()
    if count in (0, bias.numel()):
        return Part("dense" if count else "dead")
    return Part("rows", (count,), to_device(choice(live), bias.device), lanes=Lanes((count,)))
