"""What each layer computes, for tables."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..mask.saliency import SaliencyMask

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class LayerReport:
    """name: of the module. kind: "linear" | "conv" | "norm" | "other". mode: "dense" | "rows" | "tiles" | "dead", of its
    weight. impl: "triton" | "torch", who computes the weight gradient. live_rows: share of rows of its first parameter
    with a live weight. live_weights: share over all its parameters."""

    name: str
    kind: str
    mode: str
    impl: str
    live_rows: float
    live_weights: float


def kind_of(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "norm" if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm") else "other"


def report_layer(
    name: str, module: nn.Module, mode: str, impl: str, mask: SaliencyMask, names: list[str]
) -> LayerReport:
    """names: the layer's parameters as the mask calls them."""
    first, total = names[0], sum(mask.shapes[n].numel() for n in names)
    shape = mask.shapes[first]
    rows = mask.bool(first).view(shape[0] if shape else 1, -1).any(dim=1) if shape.numel() else None
    return LayerReport(
        name,
        kind_of(module),
        mode,
        impl,
        float(rows.float().mean()) if rows is not None else 0.0,
        sum(mask.count_of(n) for n in names) / total if total else 0.0,
    )
