"""Kernels for masked unlearning: saliency scores, exact thresholds, one-bit masks, a masked Adam. Needs torch alone."""

from . import torch_library as torch_library
from .adam.adopt import adopt
from .adam.foreach import all_finite
from .adam.optimizer import MaskedAdam
from .errors import MaskError, NativeLibraryError, PeckerKernelsError, ScoreError
from .mask.saliency import SaliencyMask
from .mask.shards import Piece, Shards
from .norm import group_norm_silu
from .scores.saliency import SaliencyScores
from .scores.threshold import kth_largest
from .torch_library.adam import masked_adam_
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
    "group_norm_silu",
    "kth_largest",
    "masked_adam_",
    "skip_weight_gradients",
]
