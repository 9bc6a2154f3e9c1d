"""GroupNorm and SiLU of residual blocks as one operation (`engine.norms: fused`)."""

from __future__ import annotations

from typing import Any

import pecker_kernels as pk
from torch import Tensor, nn
from torch.nn import functional as F

_KERNELS = {"cpu": "cpu", "cuda": "triton"}  # asked for by name: no other stands in for them


class NormSiLU(nn.GroupNorm):
    """A norm with the activation that follows it. Parameters and their names are the norm's own."""

    def forward(self, x: Tensor) -> Tensor:
        impl = _KERNELS.get(x.device.type, "reference")
        return pk.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, impl=impl)


class Activated(nn.Module):
    """In the place of a block's SiLU: images come activated from their norm, embeddings [N, D] do not."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dim() > 2 else F.silu(x)


def fuse_norms(network: nn.Module) -> nn.Module:
    """Let the norms of a diffusers UNet that are followed by SiLU take it over, in place; what else there is stays as it is.

    The network computes the same function of the same parameters, and keeps one tensor less of each for the way back. Copies are
    as it is. Returns it.
    """
    from diffusers.models.resnet import ResnetBlock2D

    for module in network.modules():
        if type(module) is ResnetBlock2D:
            _fuse_block(module)
    head: Any = network
    if _plain(getattr(head, "conv_norm_out", None)) and type(getattr(head, "conv_act", None)) is nn.SiLU:
        head.conv_norm_out.__class__ = NormSiLU
        head.conv_act = Activated()
    return network


def _fuse_block(block: Any) -> None:
    # a block whose embedding scales and shifts does so between its second norm and the activation
    direct = block.time_embedding_norm == "default"
    if direct and type(block.nonlinearity) is nn.SiLU and _plain(block.norm1) and _plain(block.norm2):
        block.norm1.__class__ = block.norm2.__class__ = NormSiLU
        block.nonlinearity = Activated()


def _plain(norm: Any) -> bool:
    return type(norm) is nn.GroupNorm and bool(norm.affine)
