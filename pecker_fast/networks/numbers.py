"""Whether the numbers of foreign weights are weights at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pecker_fast.errors import ModelError

LARGEST = 1e20  # squares of more overflow float32; networks hold some thousands at most


def check_numbers(where: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelError, naming the first, for tensors that are no floating-point numbers, not finite or beyond `LARGEST`; of
    tensors on the meta device no numbers are known."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{where}: tensor {name} holds {kind}; quantized weights are not supported, give the plain ones"
            )
        if not tensor.is_meta and not are_weights(tensor):
            raise ModelError(f"{where}: tensor {name} holds NaN, infinity or absurd numbers; the weights are damaged")


def are_weights(tensor: Tensor, largest: float = LARGEST) -> bool:
    """Whether a floating-point tensor holds nothing but numbers that a network can have, none beyond `largest`."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())  # float8 cannot be compared
    # as numbers: beside a float16 tensor the limit itself would be infinite. NaN is neither
    return float(low) >= -largest and float(high) <= largest
