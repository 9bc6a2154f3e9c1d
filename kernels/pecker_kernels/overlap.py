"""Tensors of one call that lie over each other in memory: kernels write them at once, in no order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def shared_pair(owned: Iterable[tuple[int, Tensor]]) -> tuple[int, int] | None:
    """The owners of two tensors that share memory, None where all lie apart; tensors with gaps are left out."""
    spans = []
    for owner, t in owned:
        if not t.numel() or isinstance(t, FakeTensor) or t.device.type == "meta":
            continue
        if torch.ops.aten.is_non_overlapping_and_dense(t):
            spans.append((str(t.device), t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), owner))
    spans.sort()
    for (device, _, end, one), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end:
            return one, other
    return None
