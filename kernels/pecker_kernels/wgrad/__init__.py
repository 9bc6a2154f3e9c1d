"""Skip the weight-gradient work of dead weights: layers compute gradients of live rows or tiles alone."""

from .flops import weight_grad_bytes, weight_grad_flops
from .report import LayerReport
from .skip import SparseBackward, skip_weight_gradients

__all__ = ["LayerReport", "SparseBackward", "skip_weight_gradients", "weight_grad_bytes", "weight_grad_flops"]
