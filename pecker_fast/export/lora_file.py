"""What training changed as a LoRA file: of every layer's change the best product of rank r (truncated SVD); of a LoRA student,
whose change is such products, those themselves.

Two ways to name its tensors: "diffusers" (PEFT's, as `pipe.load_lora_weights` writes them itself) and "kohya" (as ComfyUI and the
web interfaces know them). Biases and norms have no place in a LoRA: what they changed is lost, and counts as error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import OutputError, RecipeError
from pecker_fast.networks import AdaptedUNet

NAMES = ("diffusers", "kohya")


@dataclass(frozen=True)
class LoraStats:
    """rank: the most that a layer has. layers: that have a product. error: share of the change that the file does not hold, by
    norm: 0 = all of it. unheld: share of that of biases and norms."""

    rank: int
    layers: int
    error: float
    unheld: float


def write_lora(
    unet: nn.Module, base: Mapping[str, Tensor], new: Mapping[str, Tensor], output: Path, *, rank: int, names: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> LoraStats:  # fmt: skip
    """Write `output` as one safetensors file; base + file = new, up to the error.

    unet: whose layers the tensors are, by diffusers' names. base, new: its weights before and after. Raises RecipeError for a rank
    or names that are none, OutputError where nothing has changed that a LoRA can hold.
    """
    if rank < 1:
        raise RecipeError(f"rank: {rank}; give at least 1")
    _check_names(names)
    tensors: dict[str, Tensor] = {}
    whole = missed = unheld = 0.0
    most = count = 0
    layers = dict(_layers(unet))
    for name, weight in new.items():
        if not weight.is_floating_point():
            continue
        change = weight.double() - base[name].to(weight.dtype).double()
        size = float(change.square().sum())
        whole += size
        layer = name.removesuffix(".weight")
        if not size:
            continue
        if layer not in layers or not name.endswith(".weight"):
            missed, unheld = missed + size, unheld + size
            continue
        down, up = product(change, rank)
        kept = (up.double() @ down.double()).view_as(change)
        missed += float((change - kept).square().sum())
        most, count = max(most, len(down)), count + 1
        tensors |= named(layer, down.view(-1, *weight.shape[1:]), up, weight, names)
    if not tensors:
        raise OutputError(f"{output}: no layer has changed that a LoRA could hold; there is nothing to write")
    stats = LoraStats(most, count, math.sqrt(missed / whole), math.sqrt(unheld / whole))
    told = {"rank": str(most), "error": f"{stats.error:.3g}", **(metadata or {})}
    files.write_tensors(output, tensors, {"format": "pt", **told})
    return stats


def are_products(adapted: AdaptedUNet, rank: int) -> bool:
    """Whether all that adapters add is products of at most this rank: not where a mask keeps single weights of them."""
    return all(not one.scattered and one.lora_a.shape[0] <= rank for one in adapted.adapters().values())


def write_adapters(
    adapted: AdaptedUNet, output: Path, *, names: str = "diffusers", metadata: Mapping[str, str] | None = None
) -> LoraStats:
    """Write adapters as they are: their base + file = the student. Raises RecipeError for names that are none."""
    _check_names(names)
    tensors: dict[str, Tensor] = {}
    adapters = adapted.adapters()
    for name, one in adapters.items():
        whole: Any = adapted.base.get_submodule(name).weight
        tensors |= named(name, one.lora_a.detach(), adapted.scale * one.b().detach().flatten(1), whole.float(), names)
    rank = max((len(one.lora_a) for one in adapters.values()), default=0)
    files.write_tensors(output, tensors, {"format": "pt", "rank": str(rank), "error": "0", **(metadata or {})})
    return LoraStats(rank, len(adapters), 0.0, 0.0)


def _check_names(names: str) -> None:
    if names not in NAMES:
        raise RecipeError(f"names: {names!r}; give one of {', '.join(NAMES)}")


def product(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down [r, in], up [out, r]), float32, whose product is nearest to `change` [out, …] among all of rank r; of a change of
    lower rank r is that one."""
    flat = change.flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    held = int((s > s[0] * max(flat.shape) * torch.finfo(torch.float32).eps).sum())
    r = max(1, min(rank, held))
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).float(), (u[:, :r] * root).float()


def named(layer: str, down: Tensor, up: Tensor, weight: Tensor, names: str) -> dict[str, Tensor]:
    """The tensors of one layer under their names, in the weight's dtype."""
    dtype = torch.float16 if weight.dtype == torch.float16 else torch.float32
    up = up.view(*up.shape, *(1 for _ in weight.shape[2:]))
    down, up = down.to(dtype).contiguous(), up.to(dtype).contiguous()
    if names == "diffusers":
        return {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    key = "lora_unet_" + layer.replace(".", "_")
    alpha = torch.tensor(float(len(down)), dtype=dtype)  # the product counts once
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def _layers(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module
