"""Carrying out an Adam step: which implementation serves a list of jobs, and what it keeps between steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve, triton_kernels
from ..errors import PeckerKernelsError
from . import cpu, torch_ops
from .jobs import AdamJob, AdamStep
from .lanes import Lanes


def _refusal(which: str, jobs: Sequence[AdamJob]) -> str | None:
    if which == "cpu":
        reason = cpu.refusal(jobs)
        return None if reason is None else f"the C++ Adam {reason}"
    return triton_kernels("adam_plan").refusal(jobs)


def choose(impl: str, jobs: Sequence[AdamJob]) -> str:
    """ "cpu", "triton", "reference", or "auto" for torch's own operations where no kernel can serve.

    Raises PeckerKernelsError where the tensors do not fit each other, or the implementation asked for cannot take them.
    """
    for job in jobs:
        job.check()
    which = resolve(impl, *[job.param for job in jobs])
    if which == "reference":
        return impl
    reason = _refusal(which, jobs)
    if reason is None:
        return which
    if impl == "auto":
        return "auto"
    raise PeckerKernelsError(f"impl={impl!r}: {reason}")


@dataclass(slots=True)
class AdamPlan:
    """Jobs that are carried out again and again, with other gradients.

    key, seen: what the jobs were made for, for their owner. which: as from `choose`. cache: the implementation's own.
    counters: the jobs' counters in one piece, where they are views of it. alike: since the step before, only the addresses of
    gradients may have changed.
    """

    jobs: list[AdamJob]
    key: Hashable = None
    which: str | None = None
    cache: dict[Any, Any] = field(default_factory=dict)
    seen: Any = None
    counters: Tensor | None = None
    alike: bool = False

    @property
    def device(self) -> torch.device:
        return self.jobs[0].param.device

    def prepare(self) -> None:
        """Raise what `step` would raise, before anything is counted or written."""
        if self.which == "cpu":
            cpu.prepare(self.jobs, self.cache)

    def advance(self, settings: AdamStep) -> None:
        """Count this step, unless settings.found_inf says that it will be skipped."""
        if self.which == "cpu" and settings.found_inf is None:
            cpu.advance(self.jobs, self.cache)
            return
        if self.counters is not None:
            self.counters.add_(1)
            if settings.found_inf is not None:
                self.counters.sub_(settings.found_inf.to(self.counters.device))
            return
        steps = [job.step for job in self.jobs]
        torch._foreach_add_(steps, 1)
        if settings.found_inf is not None:
            torch._foreach_sub_(steps, [settings.found_inf.to(step.device) for step in steps])

    def step(self, settings: AdamStep) -> None:
        """Carry out the jobs; see AdamStep."""
        if self.which == "cpu":
            cpu.step(self.jobs, settings, self.cache, self.alike)
        elif self.which == "triton":
            triton_kernels("adam").step(self.jobs, settings, self.cache, self.alike)
        else:
            assert self.which is not None
            torch_ops.step(self.jobs, settings, self.which)

    def not_finite(self, settings: AdamStep) -> Tensor:
        """0-dim bool on the device: whether a gradient that the step would read holds NaN or inf."""
        if self.which == "cpu":
            return torch.tensor(not cpu.grad_stats(self.jobs, settings, self.cache)[1])
        if self.which == "triton":
            return triton_kernels("gradstats").gradstats(self.jobs, settings, self.cache, self.alike)[1] > 0
        return torch_ops.grad_stats(self.jobs, settings)


def _gradient_only(g: Tensor, bits: Tensor | None) -> AdamJob:
    """A job whose gradient can be looked at, not one to step with: its weights and state are stand-ins."""
    lanes = Lanes(g.shape) if bits is None else Lanes(g.shape, bits.to(g.device))
    masked = lanes.count != g.numel()
    g = g.detach().contiguous() if masked else g.detach()
    stand_in = g if g.dtype in (torch.float32, torch.float64) else torch.empty_like(g, dtype=torch.float32)
    return AdamJob(
        param=stand_in,
        grad=g,
        masked_grad=None,
        bits=lanes.bits if masked else None,
        whole=not masked,
        compact=masked,
        exp_avg=None,
        exp_avg_sq=stand_in.view(-1)[: lanes.count] if masked else stand_in,
        master=None,
        ema=None,
        step=torch.zeros((), device=g.device),
        first_index=0,
        kept=lanes if masked else Lanes(g.shape),
    )


def square_sum(grads: Sequence[Tensor], bits: Sequence[Tensor], clip_value: float | None, impl: str) -> Tensor:
    """0-dim float64 on the first gradient's device: Σ g² over the weights that bits keep ([] = all), clamped to
    ±clip_value first. Other weights are not read; at least one gradient."""
    jobs = [_gradient_only(g, bits[i] if bits else None) for i, g in enumerate(grads)]
    settings = AdamStep(
        lr=0.0,
        beta1=0.0,
        beta2=0.0,
        eps=0.0,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        clip_value=clip_value,
        clip_norm=None,
        ema=None,
        seed=0,
    )
    which = choose(impl, jobs)
    if which == "cpu":
        return torch.tensor(cpu.grad_stats(jobs, settings, {})[0], dtype=torch.float64)
    if which == "triton":
        return triton_kernels("gradstats").gradstats(jobs, settings, {})[0]
    return torch_ops.square_sum(jobs, settings)
