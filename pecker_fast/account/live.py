"""Bytes of tensors that are alive, and the most there ever were."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial

from torch import Tensor


class LiveBytes:
    """Counts the storage of every tensor it is shown once, until the storage is freed.

    Tensors alone: scratch memory of libraries and of the C++ kernels, and an allocator's rounding, are not in it.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.live = 0
        self.peak = 0
        self._held: dict[int, tuple[weakref.ref[object], int]] = {}
        for tensor in known:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        """Count the storage behind `tensor`, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # one address, one storage, until it is freed
        if key in self._held:
            return
        size = storage.nbytes()
        # torch keeps the Python object of a storage for as long as anything, the autograd graph too, holds the storage.
        self._held[key] = weakref.ref(storage, partial(self._freed, key)), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, _: object) -> None:
        self.live -= self._held.pop(key)[1]
