"""torch.ops.pecker.tile_weight_grad: the weight gradient of live tiles as one operation, with its FLOP formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..dispatch import resolve, triton_kernels
from ..errors import PeckerKernelsError

BUILT = ("auto", "triton", "reference")


@torch.library.custom_op("pecker::tile_weight_grad", mutates_args=())
def tile_weight_grad(
    grad_out: Tensor, x: Tensor, tiles: Tensor, count: int, height: int, width: int, impl: str = "auto"
) -> Tensor:
    """[count], lanes of live tiles of Σₖ grad_out[k] ⊗ x[k], in the dtype of x; sums in float32 or wider.

    grad_out: [k, rows]. x: [k, columns], the same floating dtype. tiles: int64 [tiles, 4], first row, first column, first
    lane, lanes a row (wgrad.tiles.Tiles), ascending lanes; it is trusted. height, width: of a tile, edges ragged.
    Raises PeckerKernelsError for shapes, dtypes and devices that do not belong together.
    """
    _check(grad_out, x, tiles, height, width)
    served = (torch.float32, torch.bfloat16, torch.float16)
    if resolve(impl, grad_out, x, tiles, built=BUILT) == "triton" and (impl == "triton" or x.dtype in served):
        return triton_kernels("wgrad").tile_weight_grad(grad_out, x, tiles, count, height, width)
    strips: list[tuple[slice, Tensor]] = []
    ends, listed = (grad_out.shape[1], x.shape[1]), tiles.tolist()
    for top in dict.fromkeys(tile[0] for tile in listed):
        lefts = [tile[1] for tile in listed if tile[0] == top]
        columns = torch.cat([torch.arange(left, min(left + width, ends[1]), device=x.device) for left in lefts])
        strips.append((slice(top, min(top + height, ends[0])), columns))
    return reference.strip_weight_grad(grad_out, x, strips)


def _check(grad_out: Tensor, x: Tensor, tiles: Tensor, height: int, width: int) -> None:
    if grad_out.dim() != 2 or x.dim() != 2 or grad_out.shape[0] != x.shape[0]:
        raise PeckerKernelsError(
            f"grad_out [k, rows] and x [k, columns] are needed, got {list(grad_out.shape)}, {list(x.shape)}"
        )
    if grad_out.dtype != x.dtype or not x.is_floating_point():
        raise PeckerKernelsError(f"grad_out is {grad_out.dtype}, x {x.dtype}: one floating dtype is needed")
    if tiles.dtype != torch.int64 or tiles.dim() != 2 or tiles.shape[1] != 4:
        raise PeckerKernelsError(f"tiles is int64 [tiles, 4], got {tiles.dtype} {list(tiles.shape)}")
    if not grad_out.device == x.device == tiles.device:
        raise PeckerKernelsError(f"grad_out is on {grad_out.device}, x on {x.device}, tiles on {tiles.device}")
    if min(height, width) < 1:
        raise PeckerKernelsError(f"a tile is at least 1x1, got {height}x{width}")


@tile_weight_grad.register_fake
def _(grad_out: Tensor, x: Tensor, tiles: Tensor, count: int, height: int, width: int, impl: str = "auto") -> Tensor:
    return x.new_empty(count)


@register_flop_formula(torch.ops.pecker.tile_weight_grad)
def _tile_weight_grad_flops(grad_out: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """A multiplication and an addition for each live weight and position."""
    return 2 * grad_out[0] * out_shape[0]
