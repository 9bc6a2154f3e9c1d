"""What weight gradients cost."""

from __future__ import annotations


def weight_grad_flops(positions: int, live: int) -> int:
    """Multiplications and additions of the gradient of `live` weights of a linear or convolution layer; positions: rows
    of the flattened input, or batch times output pixels. The same as torch's FlopCounterMode counts."""
    return 2 * positions * live


def weight_grad_bytes(positions: int, rows: int, columns: int, live: int, element_size: int = 4) -> int:
    """Floor of a linear layer: grad_out [positions, rows] and x [positions, columns], rows and columns with a live weight,
    read once, the gradient of `live` weights written once."""
    return element_size * (positions * (rows + columns) + live)
