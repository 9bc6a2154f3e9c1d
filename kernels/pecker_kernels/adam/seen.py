"""What a plan was made for, so that a step like the one before it costs a look at each tensor and no more."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Kinds = tuple[list[bool], list[tuple[torch.dtype, torch.Size]], list[tuple[int, ...]]]
_dtype_and_shape = operator.attrgetter("dtype", "shape")


def kinds_of(grads: Sequence[Tensor | None]) -> Kinds:
    """What the choice of kernels depends on: which are missing; of the others dtype, shape, strides. Raises RuntimeError for those
    without strides. (Mapped methods, as in all of this file: a loop in Python takes twice the time.)"""
    live = [g for g in grads if g is not None]
    return [g is None for g in grads], list(map(_dtype_and_shape, live)), list(map(Tensor.stride, live))


class Seen:
    """A parameter group as it was when a plan was made for it.

    state: the optimizer's, with the very entries it then held. They are compared by identity: whoever replaces one is seen; what is
    written into one (a step, a `copy_`) is no change of the plan.
    """

    def __init__(
        self, group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]], grads: Sequence[Tensor | None]
    ) -> None:
        self.params = list(group["params"])
        self.options = options_of(group)
        self.state = state
        self.dicts = list(state.values())
        self.entries = list(chain.from_iterable(map(dict.values, self.dicts)))
        self.kinds = kinds_of(self.params), kinds_of(grads)

    def still(self, group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> list[Tensor | None] | None:
        """The group's gradients where nothing else about it has changed, nor their kinds; else None."""
        params = group["params"]
        if len(params) != len(self.params) or state is not self.state or options_of(group) != self.options:
            return None
        if len(state) != len(self.dicts) or sum(map(len, self.dicts)) != len(self.entries):
            return None
        entries = chain.from_iterable(map(dict.values, self.dicts))
        same = operator.is_
        if not (all(map(same, params, self.params)) and all(map(same, state.values(), self.dicts))):
            return None
        if not all(map(same, entries, self.entries)):
            return None
        grads = [p.grad for p in params]
        try:
            return grads if (kinds_of(params), kinds_of(grads)) == self.kinds else None
        except RuntimeError:  # a sparse gradient
            return None


def options_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a group decides which tensors a step needs."""
    return group["impl"], group["betas"][0] != 0, group["ema"] is not None, group["master"], group["dense_moments"]
