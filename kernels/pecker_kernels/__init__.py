"""Kernels for masked unlearning: saliency scores, exact thresholds, one-bit masks, a masked Adam. Needs torch alone."""

from . import ops_select as ops_select
from .adopt import adopt
from .errors import MaskError, NativeLibraryError, PeckerKernelsError, ScoreError
from .foreach import all_finite
from .mask import SaliencyMask
from .ops import masked_adam_
from .optimizer import MaskedAdam
from .saliency import SaliencyScores
from .shards import Piece, Shards
from .threshold import kth_largest
from .wgrad import SparseBackward, skip_weight_gradients

__all__ = [
    "MaskError",
    "MaskedAdam",
    "NativeLibraryError",
    "PeckerKernelsError",
    "Piece",
    "SaliencyMask",
    "SaliencyScores",
    "ScoreError",
    "Shards",
    "SparseBackward",
    "adopt",
    "all_finite",
    "kth_largest",
    "masked_adam_",
    "skip_weight_gradients",
]
