"""The models that are looked at: the result, and the controls it is read against."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.forgetting import batch_of, denoised, generate
from pecker_fast.networks import Denoiser, TextDenoiser

RESULT, BEFORE, RELABEL, NEVER = "result", "before", "relabel", "never knew"
ROLES = (RESULT, BEFORE, RELABEL, NEVER)


@dataclass(frozen=True)
class Subject:
    """A frozen network and how it draws.

    role: one of `ROLES`. t_init: where a one-step generator takes its step; None = a denoiser, which takes `steps` of DDIM.
    guidance: of a denoiser.
    """

    role: str
    network: Denoiser
    t_init: int | None
    steps: int = 25
    guidance: float = 1.0

    @torch.no_grad()
    def samples(self, z: Tensor, c: Tensor) -> Tensor:
        """The network's samples [N, C, H, W] from noise z under conditions c [N], a batch at a time."""
        size = batch_of(self.network)
        device = self.network.device
        pairs = zip(z.split(size), c.split(size))
        return torch.cat([self._sample(z_i.to(device), c_i.to(device)) for z_i, c_i in pairs])

    def _sample(self, z: Tensor, c: Tensor) -> Tensor:
        if self.t_init is not None:
            return generate(self.network, z, c, self.t_init)
        return denoised(self.network, z, c, self.steps, self.guidance)

    def images(self, z: Tensor, c: Tensor) -> Tensor:
        """The same as images [N, C, H, W] in [-1, 1]."""
        return self.network.to_images(self.samples(z, c))

    def with_network(self, network: Denoiser) -> Subject:
        return replace(self, network=network)

    def sha256(self) -> str:
        """Of its weights, and of the text its conditions are."""
        tensors: list[tuple[str, Tensor]] = [(name, p.detach()) for name, p in self.network.named_parameters()]
        if isinstance(self.network, TextDenoiser):
            tensors.append(("embeds", self.network.table.embeds))
        return files.sha256_tensors(tensors)


def relabelled(before: Subject, forget: tuple[int, ...], cover: tuple[int, ...]) -> Subject:
    """The control that hides and forgets nothing: what is asked for by forget[i] is drawn as cover[i], by a copied row of the
    class embedding, or of the table of prompts; no other number changes."""
    rows, others = torch.tensor(forget), torch.tensor(cover)
    if isinstance(before.network, TextDenoiser):
        table = before.network.table
        embeds = table.embeds.clone()
        embeds[rows] = table.embeds[others]
        pooled = None if table.pooled is None else table.pooled.clone()
        if pooled is not None and table.pooled is not None:
            pooled[rows] = table.pooled[others]
        network: Any = copy.copy(before.network)
        network.table = replace(table, embeds=embeds, pooled=pooled)
    else:
        network = before.network.clone().freeze()
        with torch.no_grad():
            weight = network.unet.class_embedding.weight
            weight[rows] = weight[others]
    return replace(before, role=RELABEL, network=network)
