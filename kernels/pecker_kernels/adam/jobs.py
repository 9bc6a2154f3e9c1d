"""What one Adam step is asked to do: a job per tensor and the settings they share. The optimizer and the functional form
write them, each implementation carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PeckerKernelsError
from ..overlap import shared_pair
from .lanes import Lanes


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike, so that both can be walked as flat arrays together: strides of
    sides of length one do not count."""
    return a.stride() == b.stride() or all(
        size <= 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


@dataclass(slots=True)
class AdamJob:
    """One tensor's part in a step.

    param: floating tensor of any shape, dense in memory.
    grad: gradient of the parameter's shape and any float dtype, None = zero (only with masked_grad).
    masked_grad: the differentiated rule: the step is taken on grad + m ⊙ masked_grad. It, or grad where not `whole`, may
        be compact: 1-D with one value per kept weight in position order.
    bits: uint8 [ceil(n / 8)] in row-major order, None = every weight is kept.
    whole: every weight is updated (no mask, or the differentiated rule, where bits only choose from masked_grad);
        otherwise only the kept ones, and no other weight or state is written.
    compact: exp_avg, exp_avg_sq, master and ema are 1-D with one value per kept weight in position order; otherwise they
        have the parameter's shape and layout. Never together with `whole` under a mask.
    exp_avg: None only where beta1 is 0. master: float32 truth of 16-bit weights. ema: average of the weights.
        All of the work dtype: float64 for float64 weights, float32 else.
    step: 0-dim float32 on the parameter's device, already counting this step, from 1.
    first_index: flat index of the tensor's first weight in the model, for stochastic rounding.
    kept: the lanes of bits, where the caller has them already.
    """

    param: Tensor
    grad: Tensor | None
    masked_grad: Tensor | None
    bits: Tensor | None
    whole: bool
    compact: bool
    exp_avg: Tensor | None
    exp_avg_sq: Tensor
    master: Tensor | None
    ema: Tensor | None
    step: Tensor
    first_index: int
    kept: Lanes | None = None

    @property
    def lanes(self) -> Lanes:
        """The kept weights. Made once, and kept."""
        if self.kept is None:
            self.kept = Lanes(self.param.shape, self.bits)
        return self.kept

    def is_compact(self, grad: Tensor | None) -> bool:
        """Whether this gradient holds the kept weights alone. (With as many kept weights as a vector has, bits is None.)"""
        return grad is not None and self.bits is not None and grad.dim() == 1 and grad.shape != self.param.shape

    def may_be_compact(self, name: str) -> bool:
        """name: "grad" or "masked_grad"."""
        return self.whole if name == "masked_grad" else not self.whole and self.masked_grad is None

    def check(self) -> None:
        """Raise PeckerKernelsError for tensors that no implementation could walk together: kernels read raw memory."""
        p, n = self.param, self.param.numel()
        for name, g in (("grad", self.grad), ("masked_grad", self.masked_grad)):
            if g is None:
                continue
            if not g.is_floating_point() or g.is_sparse or g.device != p.device:
                raise PeckerKernelsError(
                    f"a gradient is {g.dtype} on {g.device}: dense floating numbers on {p.device} are expected"
                )
            if g.shape == p.shape:
                continue
            if not (self.may_be_compact(name) and self.is_compact(g) and g.numel() == self.lanes.count):
                raise PeckerKernelsError(f"a gradient is {list(g.shape)}, its weights {list(p.shape)}")
        lanes = self.lanes.count if self.compact else n
        for t in (self.exp_avg, self.exp_avg_sq, self.master, self.ema):
            if t is not None and t.numel() != lanes:
                raise PeckerKernelsError(f"the state of weights {list(p.shape)} holds {t.numel()} values for {lanes}")
        if self.bits is not None and self.bits.numel() != (n + 7) // 8:
            raise PeckerKernelsError(f"the mask of weights {list(p.shape)} has {self.bits.numel()} bytes")
        step = self.step
        if step.dtype != torch.float32 or step.numel() != 1:
            raise PeckerKernelsError(f"steps are counted in one float32 number, got {step.dtype} {list(step.shape)}")


def refuse_shared(jobs: Sequence[AdamJob]) -> None:
    """Raise PeckerKernelsError where what two jobs of one step write lies in the same memory."""
    written = [
        (i, t)
        for i, job in enumerate(jobs)
        for t in (job.param, job.exp_avg, job.exp_avg_sq, job.master, job.ema, job.step)
        if t is not None
    ]
    pair = shared_pair(written)
    if pair is not None:
        one, other = (f"{i} {list(jobs[i].param.shape)}" for i in pair)
        raise PeckerKernelsError(
            f"weights {one} and {other} of a step, or their state, share memory: give tied weights once, or step on them "
            "in groups of their own"
        )


@dataclass(slots=True)
class AdamStep:
    """The settings of one step over a list of jobs; the formula is reference.adam_.

    Order on each gradient value: divide by grad_scale, add the masked gradient (scaled alike), clamp to ±clip_value,
    scale by min(1, clip_norm / (norm + 1e-6)) with the norm over all updated weights of all jobs, L2 weight decay.
    ema: decay d of e ← e + (1-d)·(p - e), after the update, on the master where there is one.
    bfloat16 weights without a master are rounded by reference.stochastic_round_bf16 with
    reference.random_bits16(first_index + position, seed, step).
    found_inf: 0-dim float32; where it is not 0 nothing is written. grad_scale: 0-dim float32. lr: float, or 0-dim tensor
    that is read on its device.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    clip_value: float | None
    clip_norm: float | None
    ema: float | None
    seed: int
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
