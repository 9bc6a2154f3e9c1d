"""The backward pass of θ for branches that the mask limits: weight gradients of live weights alone."""

from collections.abc import Sequence

import torch
from pecker_kernels import SaliencyMask, SparseBackward, skip_weight_gradients
from torch import Tensor, nn

from pecker_fast.engine.state import TrainState
from pecker_fast.forgetting import Gradients


class LiveBackward:
    """Plans once per mask which layers compute which weight gradients. `wanted` false: never (`mask.skip`)."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._of: tuple[nn.Module, SaliencyMask] | None = None
        self._sparse: SparseBackward | None = None

    def of(self, state: TrainState, group: Sequence[str]) -> SparseBackward | None:
        """What to run θ's forward pass of these branches in; None where they need all gradients, or none could be saved."""
        mask, network = state.mask, state.generator.unet
        if not self.wanted or mask is None or not state.updates.limits(group):
            return None
        if self._of is None or self._of[0] is not network or self._of[1] is not mask:
            with skip_weight_gradients(network, mask) as sparse:
                saves = any(layer.mode != "dense" for layer in sparse.report())
            self._of, self._sparse = (network, mask), sparse if saves else None
        return self._sparse


def gradients_of(x: Tensor, parameters: list[nn.Parameter], dx: Tensor, sparse: SparseBackward | None) -> Gradients:
    """Gradients of Σ x · dx, one entry for each parameter: as autograd gives them, or compact ones (MaskedAdam.step)."""
    if sparse is None:
        return torch.autograd.grad(x, parameters, dx, allow_unused=True)
    leaves = [leaf for leaf in sparse.leaves if leaf is not None]
    if not leaves or not x.requires_grad:
        return [None] * len(parameters)
    return sparse.compact(torch.autograd.grad(x, leaves, dx, allow_unused=True))
