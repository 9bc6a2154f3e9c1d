"""The draws of one branch."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One branch's draws, n samples."""

    z: Tensor  # [n, C, H, W], what the generator starts from: x_{t_g} = b_{t_g} z
    t_g: Tensor  # [n], its timestep
    e: Tensor  # [n, C, H, W]
    t: Tensor  # [n]
    c_g: Tensor  # [n], condition of the generator
    c_s: Tensor  # [n], condition of the score network
    c_p: Tensor  # [n], condition of the teacher

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def part(self, samples: slice) -> "Batch":
        """Some of the samples; the whole batch itself where that is all of them."""
        if samples.start == 0 and samples.stop >= self.z.shape[0]:
            return self
        return Batch(*(tensor[samples] for tensor in self.tensors()))


def concatenate(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(batch.tensors() for batch in batches))))
