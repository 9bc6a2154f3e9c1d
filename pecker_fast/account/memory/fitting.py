"""The memory that training a network from scratch will take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pecker_fast.account.iteration import unique_bytes
from pecker_fast.account.memory.measured import LiveMode
from pecker_fast.account.memory.networks import Kernels
from pecker_fast.account.memory.prediction import Prediction


def predict_fit(
    make: Callable[[], nn.Module], loss_of: Callable[[nn.Module], Tensor], beside_bytes: int = 0
) -> Prediction:
    """Peak memory of a step with AdamW and an average of the weights, on tensors without memory.

    make: the network. loss_of: its loss over one batch; both run inside a FakeTensorMode. beside_bytes: what else lies in memory,
    the images. Tensors alone, as `predict`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Kernels(fused=True, fp32_norms=False):
        network = make()
        weights = list(network.parameters())
        average = [torch.empty_like(p) for p in weights]
        moments = [torch.empty_like(p) for p in weights for _ in range(2)]
        with LiveMode([*weights, *average, *moments]) as live:
            loss_of(network).backward()
        gradients = unique_bytes([p.grad for p in weights])
    one = unique_bytes([*weights])
    parts = {"network": one, "average": one, "optimizer": 2 * one, "gradients": gradients, "images": beside_bytes}
    peak = live.live.peak + beside_bytes
    parts["activations"] = peak - sum(parts.values())
    return Prediction(parts, {"training step": peak}, flops={"step": live.flops})
