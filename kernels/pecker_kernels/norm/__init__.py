"""GroupNorm and SiLU as one operation, forward and back."""

from .function import group_norm_silu

__all__ = ["group_norm_silu"]
