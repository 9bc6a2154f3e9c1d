"""What an implementation of scoring and selection provides; saliency.py, threshold.py and selection.py are written
against these functions alone.

A score is read as its key: the 31 low bits of its float32 value, which order like |score|. Float16 and bfloat16 scores
are widened to float32 first (exact). A radix select takes the top 11 (`first`), next 10 (`second`) and last 10 bits
(`third`) of the key; all counts are int64, so ranks can add theirs. Flat indices are row-major whatever the strides.

Empty tensors may stand anywhere in a list, and lists may be empty. Tensors of one call lie on one device, except for
the reference; results stay there. Nothing needs to wait for the device: callers read the results.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, float64

from ..dispatch import resolve, triton_kernels
from ..errors import PeckerKernelsError

FIRST_BITS, SECOND_BITS, THIRD_BITS = 11, 10, 10
FIRST_SHIFT, SECOND_SHIFT = 20, 10
NOT_FINITE, NEGATIVE = 1, 2  # bits of a fault
SAMPLE_BLOCK = 4096
ALL_TIES = -1


@dataclass(frozen=True)
class Census:
    """The first pass over scores.

    counts: int64 [2048] of the top 11 bits of the keys, over all tensors together; what faulty values count is open.
    faults: uint8 [number of tensors], NOT_FINITE if a tensor holds NaN or inf, NEGATIVE if it holds a value below -0.0
    (never with magnitude; open where NOT_FINITE is set).
    """

    counts: Tensor
    faults: Tensor


class Backend(Protocol):
    """tensors, scores: float32, float16 or bfloat16 of any shape. magnitude: rank |score| and accept negative values;
    without it, values below -0.0 are a fault. -0.0 equals +0.0 either way."""

    def accumulate_(
        self, scores: Sequence[Tensor], grads: Sequence[Tensor | None], reduction: str, census: bool
    ) -> Census | None:
        """score += g ("sum"), |g| ("abs") or g·g ("square") in float32 and in place, g rounded to float32 first.

        scores: contiguous float32. grads: same shapes, float32 | float16 | bfloat16 | float64, any strides, None for
        zero. census: return the census of the new scores, all of them (magnitude for "sum"), unless it would not be used
        (SAMPLED_FROM), else None.
        """

    def rms_sums(self, square_sums: Sequence[Tensor], count: int) -> Tensor:
        """float64 [number of tensors]: Σ sqrt(s / count) of each contiguous float32 tensor; roots in float32, the sum
        in float64 and in an order that does not depend on threads or timing. NaN and inf come through."""

    def contrast_(
        self, scores: Sequence[Tensor], square_sums: Sequence[Tensor], count: int, floor_value: float, magnitude: bool
    ) -> Census | None:
        """score = s / (sqrt(square_sum / count) + floor_value) in float32 and in place, s = |score| with magnitude;
        returns the census of the new scores, unless it would not be used. All tensors contiguous float32 of equal shapes."""

    def census(self, tensors: Sequence[Tensor], magnitude: bool) -> Census:
        """The first histogram and the faults."""

    SAMPLED_FROM: int | None
    """How many values, over all ranks, there must be for a selection to begin with `sample` and `bracket`; None: never. Where it
    does, no census is used: `accumulate_` and `contrast_` may leave it out from there on."""

    def sample(self, tensors: Sequence[Tensor], per: int) -> Tensor:
        """int32 [any number]: keys of values at pseudo-random places, the same in every call: `per` of them, a power of two up to
        SAMPLE_BLOCK, in every SAMPLE_BLOCK values of a tensor. -1 stands for places behind its end, so that every value is as
        likely to be taken as every other."""

    def bracket(
        self, tensors: Sequence[Tensor], magnitude: bool, bounds: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(above, filled, pool, faults): keys above bounds[1], int64 [1], and those from bounds[0] to bounds[1] in any order.

        bounds: int32 [2] on the tensors' device. pool: int32 [regions, room of each], with room for `capacity` or a little more.
        filled: integers [regions], how many keys fell into each; where one is more than its room, the pool lacks some. faults: as
        in Census; keys of faulty tensors may be counted anyhow."""

    def second_histogram(
        self, tensors: Sequence[Tensor], magnitude: bool, prefix: int, expected: int
    ) -> tuple[Tensor, Any]:
        """(int64 [1024], pool): counts of key bits 10..19 among keys whose top 11 bits equal `prefix`.

        expected: how many of these tensors' keys have the prefix. pool: whatever helps `third_histogram`, e.g. a buffer
        of those keys; None where nothing does. The scores have no faults.
        """

    def third_histogram(self, tensors: Sequence[Tensor], magnitude: bool, prefix: int, pool: Any) -> Tensor:
        """int64 [1024]: counts of key bits 0..9 among keys whose top 21 bits equal `prefix`; pool comes from the call
        of `second_histogram` before on the same tensors."""

    def tie_counts(self, tensors: Sequence[Tensor], magnitude: bool, threshold: float) -> Tensor:
        """int64 [number of tensors]: values equal to `threshold` (|value| with magnitude)."""

    def keep_bits(
        self, tensors: Sequence[Tensor], magnitude: bool, threshold: float, rooms: Sequence[int]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """(bits, counts, faults): values above `threshold` kept, and of those equal to it the first rooms[i] of tensor i
        in flat order, or every one for ALL_TIES.

        bits: uint8 [ceil(n / 8)] per tensor, least significant bit first, padding zero. counts: int64 [number of
        tensors], ones in each. faults: as in Census, of use where no census was taken. `threshold` ≥ 0 is rounded to
        each tensor's dtype first, as torch rounds a Python number in a comparison.
        """

    def block_sums(self, tensor: Tensor, height: int, width: int, magnitude: bool) -> Tensor:
        """float64 [blocks down · blocks across]: sums of the score (|score| with magnitude) over the height x width
        blocks of the view [shape[0], rest], row-major, edges ragged; float64 sums in an order that does not depend on
        threads. The tensor is not empty; NaN and inf come through."""

    def block_bits(self, kept: Tensor, shape: Sequence[int], height: int, width: int) -> Tensor:
        """uint8 [ceil(n / 8)] of a non-empty tensor's shape: the blocks that `kept`, bool [blocks], has as True."""


def serving(impl: str, *tensors: Tensor) -> Backend:
    """The functions that serve a call on these tensors; `impl` as in dispatch.resolve. "auto" turns to torch for float64,
    which the others do not take."""
    name = resolve(impl, *tensors)
    return backend("reference" if impl == "auto" and any(t.dtype == float64 for t in tensors) else name)


def backend(name: str) -> Backend:
    """The functions of "triton", "cpu" or "reference" (a name from dispatch.resolve)."""
    try:
        if name == "triton":
            return cast(Backend, triton_kernels("select"))
        # by name as well: both back ends look at the constants and types of this file
        return cast(Backend, importlib.import_module({"cpu": ".cpu", "reference": ".torch_ops"}[name], __package__))
    except ImportError as error:
        raise PeckerKernelsError(f"impl={name!r} has no selection kernels here: {error}") from error


def grid(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the view [shape[0], rest]."""
    columns = 1
    for side in shape[1:]:
        columns *= int(side)
    return (int(shape[0]) if len(shape) else 1), columns
