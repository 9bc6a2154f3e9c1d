"""What every operation takes, computes and moves; tests and benchmarks iterate over SPECS.

n is the number of weights, d the mask's density. FLOPs count floating additions, multiplications, divisions, roots and
comparisons as one each. Bytes are the floor: every value read or written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import reference
from .adam import foreach
from .dispatch import IMPLEMENTATIONS
from .mask import bits as bitmask
from .scores import saliency, threshold
from .torch_library import adam as ops
from .torch_library import scores as ops_select
from .torch_library import wgrad as ops_wgrad

_FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class OpSpec:
    """One operation: where its implementations are, what it takes and what it costs."""

    name: str
    inputs: tuple[str, ...]
    dtypes: tuple[str, ...]
    implementations: tuple[str, ...]
    public: Callable
    truth: Callable
    flops: Callable[[int, float], float]  # (n, d) -> floating operations
    bytes_moved: Callable[[int, float], float]  # (n, d) -> bytes


def _live_lines(d: float) -> float:
    """Share of the 64-byte lines of float32 that hold a kept weight, lanes at random."""
    return 1 - (1 - d) ** 16


SPECS = {
    spec.name: spec
    for spec in (
        OpSpec(
            "pack_bits",
            ("keep [n]",),
            ("bool", "uint8"),
            IMPLEMENTATIONS,
            bitmask.pack_bits,
            reference.pack_bits,
            flops=lambda n, d: 0,
            bytes_moved=lambda n, d: n + n / 8,
        ),
        OpSpec(
            "unpack_bits",
            ("bits [n / 8]", "n"),
            ("uint8",),
            IMPLEMENTATIONS,
            bitmask.unpack_bits,
            reference.unpack_bits,
            flops=lambda n, d: 0,
            bytes_moved=lambda n, d: n + n / 8,
        ),
        OpSpec(
            "popcount",
            ("bits [n / 8]",),
            ("uint8",),
            IMPLEMENTATIONS,
            bitmask.popcount,
            reference.popcount,
            flops=lambda n, d: 0,
            bytes_moved=lambda n, d: n / 8,
        ),
        OpSpec(
            "apply_",
            ("tensor [n]", "bits [n / 8]"),
            _FLOATS,
            IMPLEMENTATIONS,
            bitmask.apply_,
            reference.apply_,
            flops=lambda n, d: 0,
            # Unstructured mask: every cache line is read and written.
            bytes_moved=lambda n, d: 8 * n + n / 8,
        ),
        OpSpec(
            "kth_largest",
            ("tensors [n]", "k"),
            ("float32", "float16", "bfloat16"),
            IMPLEMENTATIONS,
            threshold.kth_largest,
            reference.kth_largest,
            flops=lambda n, d: 0,
            # Two passes over float32 scores; the few values of the bin that the second one packs are read from a cache.
            bytes_moved=lambda n, d: 8 * n,
        ),
        OpSpec(
            "keep_top_k",
            ("tensors [n]", "k"),
            ("float32", "float16", "bfloat16"),
            IMPLEMENTATIONS,
            threshold.keep_top_k,
            reference.keep_top_k,
            flops=lambda n, d: ops_select.KEEP_FLOPS * n,
            # The passes of kth_largest, one more that writes bits, and those bits unpacked.
            bytes_moved=lambda n, d: 8 * n + 4 * n + n / 8 + n / 8 + n,
        ),
        OpSpec(
            "accumulate_",
            ("score [n]", "grad [n]"),
            ("float32", "float16", "bfloat16", "float64"),
            IMPLEMENTATIONS,
            saliency.SaliencyScores.accumulate,
            reference.accumulate_,
            # "square", the dearest: "sum" and "abs" are one addition.
            flops=lambda n, d: ops_select.ACCUMULATE_FLOPS["square"] * n,
            # float32 gradients; the histogram of the last call is counted in the cache.
            bytes_moved=lambda n, d: 12 * n,
        ),
        OpSpec(
            "contrast_",
            ("score [n]", "other_square_sum [n]"),
            ("float32",),
            IMPLEMENTATIONS,
            saliency.SaliencyScores.contrast_,
            reference.contrast_,
            flops=lambda n, d: ops_select.CONTRAST_FLOPS * n,
            bytes_moved=lambda n, d: 12 * n + 4 * n,
        ),
        OpSpec(
            "adam_",
            ("param [n]", "grad [n]", "exp_avg [n]", "exp_avg_sq [n]", "step"),
            ("float32", "float64"),
            ("auto", "reference"),
            foreach.adam_,
            reference.adam_,
            flops=lambda n, d: ops.ADAM_FLOPS * n,
            bytes_moved=lambda n, d: 28 * n,
        ),
        OpSpec(
            "masked_adam_",
            ("params [n]", "grads [n]", "bits [n / 8]", "exp_avgs [d n]", "exp_avg_sqs [d n]", "step"),
            _FLOATS,
            IMPLEMENTATIONS,
            ops.masked_adam_,
            reference.adam_,
            flops=lambda n, d: ops.ADAM_FLOPS * d * n,
            # Compact moments are dense vectors; parameter and gradient lines of 64 bytes are moved whole where any lane
            # is live.
            bytes_moved=lambda n, d: 16 * d * n + 12 * n * _live_lines(d) + n / 8,
        ),
        OpSpec(
            "differentiated_adam_",
            ("params [n]", "grads [n]", "bits [n / 8]", "exp_avgs [n]", "exp_avg_sqs [n]", "step", "masked_grads [n]"),
            _FLOATS,
            IMPLEMENTATIONS,
            ops.masked_adam_,
            reference.adam_,
            flops=lambda n, d: (ops.ADAM_FLOPS + ops.MASKED_GRAD_FLOPS) * n,
            bytes_moved=lambda n, d: 28 * n + 4 * n * _live_lines(d) + n / 8,
        ),
        OpSpec(
            "clip_norm_factor",
            ("grads [n]", "bits [n / 8]", "max_norm"),
            _FLOATS,
            IMPLEMENTATIONS,
            ops_select.clip_norm_factor,
            reference.clip_norm_factor,
            flops=lambda n, d: ops_select.CLIP_NORM_FLOPS * n,
            bytes_moved=lambda n, d: 4 * n * _live_lines(d) + n / 8,
        ),
        OpSpec(
            "tile_weight_grad",
            ("grad_out [k, rows]", "x [k, columns]", "tiles [live, 4]"),
            ("float32", "float16", "bfloat16"),
            ops_wgrad.BUILT,
            ops_wgrad.tile_weight_grad,
            reference.strip_weight_grad,
            # Of one position: k times as many.
            flops=lambda n, d: 2 * d * n,
            # Written; what is read depends on rows, columns and k: wgrad.weight_grad_bytes.
            bytes_moved=lambda n, d: 4 * d * n,
        ),
    )
}
