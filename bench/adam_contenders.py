"""One optimizer step as ours and as the peers take it: each builder turns a Problem into something to run.

Peers write the same weights from the same gradients; who spoils the gradient gets it back before its next run, untimed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import deepspeed_adam
import pecker_kernels as pk
import torch
from harness import Contender
from shapes import Shapes
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR, BETAS, EPS, CLIP, EMA = 1e-5, (0.9, 0.999), 1e-8, 1.0, 0.999


@lru_cache
def implementation(device: str) -> str:
    """The kernel that is named in the result; "auto" only where MaskedAdam has none for this device."""
    wanted = "cpu" if device == "cpu" else "triton"
    try:
        p = torch.zeros(1, device=device, requires_grad=True)
        p.grad = torch.zeros_like(p)
        pk.MaskedAdam([p], impl=wanted).step()
    except pk.PeckerKernelsError:
        return "auto"
    return wanted


class Problem:
    """Weights and random gradients of a tensor list, with the mask that goes with them."""

    def __init__(self, shapes: Shapes, mask: pk.SaliencyMask | None, betas: tuple[float, float], device: str) -> None:
        self.shapes, self.device, self.betas, self.mask = shapes, device, betas, mask
        generator = torch.Generator(device).manual_seed(0)

        def normal() -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device) for _, shape in shapes]

        self.named = [(name, torch.nn.Parameter(w * 0.02)) for (name, _), w in zip(shapes, normal())]
        self.params = [p for _, p in self.named]
        self.source = normal()
        self._normal = normal
        for p, g in zip(self.params, self.source):
            p.grad = g.clone()

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    @cached_property
    def forget(self) -> list[Tensor]:
        """The gradients that the differentiated rule masks."""
        return self._normal()

    @cached_property
    def compact(self) -> list[Tensor]:
        """The gradients of kept weights, as a backward pass that skips the others leaves them."""
        assert self.mask is not None
        return [g[self.mask.bool(name)] for (name, _), g in zip(self.shapes, self.grads)]

    @cached_property
    def float_masks(self) -> list[Tensor]:
        """The mask as mask-multiplying code keeps it: 1.0 and 0.0."""
        assert self.mask is not None
        return [self.mask.bool(name).float() for name, _ in self.shapes]

    def restore(self) -> None:
        torch._foreach_copy_(self.grads, self.source)

    def torch_adam(self, params: Any = None, **settings: Any) -> torch.optim.Adam:
        return torch.optim.Adam(params or self.params, LR, betas=self.betas, eps=EPS, fused=True, **settings)


Builder = Callable[[Problem], Contender]


def ours(problem: Problem, named: Any = None, **settings: Any) -> pk.MaskedAdam:
    return pk.MaskedAdam(
        named or problem.named, problem.mask, LR, problem.betas, EPS, impl=implementation(problem.device), **settings
    )


def ours_step(problem: Problem) -> Contender:
    return Contender("ours", ours(problem).step)


def ours_compact(problem: Problem) -> Contender:
    """The same weights without a dense gradient, which the peers need."""
    optimizer = ours(problem, [(name, torch.nn.Parameter(p.detach())) for name, p in problem.named])
    return Contender("ours", lambda: optimizer.step(compact_grads=problem.compact))


def ours_differentiated(problem: Problem) -> Contender:
    optimizer = ours(problem)
    return Contender("ours", lambda: optimizer.step(problem.forget))


def ours_extras(problem: Problem) -> Contender:
    """Finite check, clip and average with the step; the answer of the check is waited for, as a training loop does."""
    optimizer = ours(problem, clip_value=CLIP, ema=EMA)

    def run() -> None:
        if bool(pk.all_finite(problem.grads)):
            optimizer.step()

    return Contender("ours", run)


def fused(problem: Problem) -> Contender:
    return Contender("torch fused", problem.torch_adam().step)


def mask_multiply(problem: Problem) -> Contender:
    """SalUn style."""
    optimizer, masks = problem.torch_adam(), problem.float_masks

    def run() -> None:
        for p, m in zip(problem.params, masks):
            p.grad.mul_(m)
        optimizer.step()

    return Contender("mask-multiply + fused", run, problem.restore)


def boolean_index(problem: Problem) -> Contender:
    """LIFT style: kept weights and gradients as compact vectors, Adam on them, and back."""
    assert problem.mask is not None
    lanes = [(p, problem.mask.indices(name)) for name, p in problem.named if problem.mask.count_of(name)]
    compact = [torch.nn.Parameter(p.detach().view(-1)[index]) for p, index in lanes]
    optimizer = problem.torch_adam(compact)

    @torch.no_grad()
    def run() -> None:
        for (p, index), c in zip(lanes, compact):
            torch.index_select(p.detach().view(-1), 0, index, out=c.data)
            c.grad = p.grad.view(-1).index_select(0, index)
        optimizer.step()
        for (p, index), c in zip(lanes, compact):
            p.view(-1).index_copy_(0, index, c)

    return Contender("boolean index + fused", run)


def combine_loop(problem: Problem) -> Contender:
    """The differentiated rule tensor by tensor."""
    optimizer, masks, forget = problem.torch_adam(), problem.float_masks, problem.forget

    def run() -> None:
        for p, m, f in zip(problem.params, masks, forget):
            p.grad.add_(f * m)
        optimizer.step()

    return Contender("mask-multiply, add + fused", run, problem.restore)


def combine_foreach(problem: Problem) -> Contender:
    optimizer, masks, forget = problem.torch_adam(), problem.float_masks, problem.forget

    def run() -> None:
        torch._foreach_addcmul_(problem.grads, forget, masks)
        optimizer.step()

    return Contender("foreach addcmul + fused", run, problem.restore)


def fused_foreach(problem: Problem) -> Contender:
    """torch's fastest operations one after the other; with a mask it is multiplied in first."""
    optimizer = problem.torch_adam()
    averages = [p.detach().clone() for p in problem.params]
    masks = problem.float_masks if problem.mask is not None else None

    @torch.no_grad()
    def run() -> None:
        grads = problem.grads
        if not bool(torch.stack(torch._foreach_norm(grads, float("inf"))).isfinite().all()):
            return
        if masks is not None:
            torch._foreach_mul_(grads, masks)
        torch._foreach_clamp_min_(grads, -CLIP)
        torch._foreach_clamp_max_(grads, CLIP)
        optimizer.step()
        torch._foreach_lerp_(averages, problem.params, 1 - EMA)

    return Contender("fused + foreach", run, problem.restore)


def deepspeed(problem: Problem) -> Contender:
    """DeepSpeedCPUAdam or FusedAdam."""
    made = deepspeed_adam.adam(problem.device, problem.params, lr=LR, betas=problem.betas, eps=EPS)
    return Contender("DeepSpeed", made.step)


# DeepSpeed's kernel rounds more coarsely than torch's (updates of size 1 are off by up to 3.4e-6): it does the same work, so it is
# timed, under a tolerance of its own on the update, relative where that is above 1.
COARSE = {"DeepSpeed": 1e-5}
OTHERS: list[Builder] = [deepspeed] if deepspeed_adam.built(DEVICE) else []

# operation -> (ours, peers that do the same, peers that step on every weight)
OPERATIONS: dict[str, tuple[Builder, list[Builder], list[Builder]]] = {
    "dense": (ours_step, [fused, *OTHERS], []),
    "dense_beta1_0": (ours_step, [fused, *OTHERS], []),
    "masked": (ours_step, [mask_multiply, boolean_index], [fused]),
    "compact": (ours_compact, [mask_multiply, boolean_index], []),
    "differentiated": (ours_differentiated, [combine_loop, combine_foreach], []),
    "extras": (ours_extras, [fused_foreach], []),
}
