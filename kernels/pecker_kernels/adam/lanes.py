"""The salient lanes of one tensor: their positions, and moving values between the tensor and a compact vector."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..errors import MaskError
from ..mask import bits as bitmask
from ..mask.saliency import SaliencyMask

STALE = "the bits of a mask were changed while weights were stepped on by them: set the mask anew"
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _storage_positions(index: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Row-major flat positions -> offsets into the storage of a tensor with these strides."""
    offset = torch.zeros_like(index)
    rest = index
    for size, step in zip(reversed(shape), reversed(stride)):
        offset += rest % size * step
        rest = rest // size
    return offset


class Lanes:
    """Positions of the `count` weights that are updated in a tensor of `shape`, ascending in row-major order.

    bits: uint8 [ceil(n / 8)] that nobody else writes, or None where every weight is updated. A compact vector holds one
    value per lane in that order, and where every weight is a lane "compact" is the tensor itself. count: the ones, where
    the caller has counted them.
    """

    def __init__(self, shape: Sequence[int], bits: Tensor | None = None, count: int | None = None) -> None:
        self.shape = torch.Size(shape)
        self.bits = bits
        if bits is None:
            self.count = self.shape.numel()
        else:
            self.count = bitmask.popcount(bits) if count is None else count
        self._positions: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def of(cls, mask: SaliencyMask, name: str, device: torch.device) -> Lanes:
        """Of one tensor of a mask that nobody else writes (see SaliencyMask.clone), on `device`."""
        shape, count = mask.shapes[name], mask.count_of(name)
        return cls(shape) if count == shape.numel() else cls(shape, mask.bits[name].to(device), count)

    @functools.cached_property
    def index(self) -> Tensor | None:
        """int64 [count] positions, None where every weight is a lane. Eight bytes a lane, so made only where torch
        operations need it; the kernels read the bits."""
        return None if self.bits is None else bitmask.kept_indices(self.bits, self.shape.numel())

    @functools.cached_property
    def _rank(self) -> Tensor:
        assert self.bits is not None
        rank = native.rank_of(self.bits, self.shape.numel())
        if int(rank[-1]) != self.count:
            raise MaskError(STALE)
        return rank

    def rank(self) -> Tensor:
        """See native.rank_of."""
        return self._rank

    def _flat(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        index = self.index
        assert index is not None
        if tensor.shape != self.shape:
            raise MaskError(f"expected a tensor of shape {list(self.shape)}, got {list(tensor.shape)}")
        if tensor.is_contiguous():
            return tensor.view(-1), index
        stride = tensor.stride()
        if stride not in self._positions:
            self._positions[stride] = _storage_positions(index, self.shape, stride)
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, stride))
        return tensor.as_strided((extent,), (1,)), self._positions[stride]

    def gather(self, tensor: Tensor) -> Tensor:
        """[shape] -> [count], a copy; the tensor itself where every weight is a lane."""
        if self.bits is None:
            return tensor
        flat, positions = self._flat(tensor)
        return flat.index_select(0, positions)

    def scatter_(self, tensor: Tensor, values: Tensor) -> Tensor:
        """Write the lanes of `tensor` [shape] from `values` [count]; no other element is touched."""
        if self.bits is None:
            return tensor.copy_(values)
        flat, positions = self._flat(tensor)
        # As integers: torch's CPU scatter_ of 16-bit floats passes the whole tensor through float32, which rewrites
        # NaNs it was not asked to touch.
        bits = _SAME_SIZE[tensor.element_size()]
        flat.view(bits).scatter_(0, positions, values.to(tensor.dtype).view(bits))
        return tensor

    def flat_index(self, device: torch.device) -> Tensor:
        """int64 row-major positions, in the shape of the compact values."""
        index = self.index
        return torch.arange(self.count, device=device).view(self.shape) if index is None else index
