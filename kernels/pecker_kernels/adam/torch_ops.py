"""The Adam step in torch operations: any device, layout and floating dtype. Kept values are gathered into compact
vectors, stepped on and scattered back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from . import foreach
from .jobs import AdamJob, AdamStep
from .lanes import Lanes


def work_dtype(p: Tensor) -> torch.dtype:
    """Moments of 16-bit weights are kept, and the step computed, in float32."""
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


def _lanes(job: AdamJob) -> Lanes:
    """Those the step is taken on."""
    return Lanes(job.param.shape) if job.whole or job.bits is None else job.lanes


def _gradient(job: AdamJob, lanes: Lanes, settings: AdamStep) -> Tensor:
    """A copy, in the layout of the values stepped on."""
    dtype, scale = work_dtype(job.param), settings.grad_scale

    def ready(g: Tensor) -> Tensor:
        g = g.to(dtype)
        return g if scale is None else g / scale.to(g.device, dtype)

    if not job.whole or job.masked_grad is None:
        assert job.grad is not None
        return ready(job.grad if job.is_compact(job.grad) else lanes.gather(job.grad)).clone()
    total = torch.zeros_like(job.param, dtype=dtype)
    if job.grad is not None:
        total.copy_(ready(job.grad))
    if job.bits is None:
        return total.add_(ready(job.masked_grad))
    kept, more = job.lanes, job.masked_grad
    return kept.scatter_(total, kept.gather(total) + ready(more if job.is_compact(more) else kept.gather(more)))


def grad_stats(jobs: Sequence[AdamJob], settings: AdamStep) -> Tensor:
    """0-dim bool: whether a gradient the step would read holds NaN or inf."""
    return ~foreach.all_finite([_gradient(job, _lanes(job), settings) for job in jobs])


def square_sum(jobs: Sequence[AdamJob], settings: AdamStep) -> Tensor:
    """0-dim float64 on the first job's device: Σ g² of the gradients the step would take, clamped, not yet scaled."""
    grads = [_gradient(job, _lanes(job), settings) for job in jobs]
    foreach.clip_(grads, settings.clip_value, None)
    norms = [torch.linalg.vector_norm(g).to(grads[0].device, torch.float64) for g in grads]
    return torch.stack(norms).square().sum()


def step(jobs: Sequence[AdamJob], settings: AdamStep, impl: str) -> None:
    """Carry out the jobs. impl: "auto" runs torch's fused kernel where it can, "reference" the formulas of reference.py.

    Waits for the device where settings.found_inf is given.
    """
    s = settings
    if s.found_inf is not None and float(s.found_inf) != 0:
        return
    weights, moments, grads = [], [], []
    for job in jobs:
        lanes = _lanes(job)
        # Rows of the state that belong to the weights updated now; a copy where the state is of full size and the
        # update is not.
        pick = lanes.gather if lanes.bits is not None and not job.compact else (lambda t: t)
        p = job.param.detach()
        source = lanes.gather(p) if job.master is None else pick(job.master)
        weights.append(source.to(work_dtype(p)))
        moments.append((None if job.exp_avg is None else pick(job.exp_avg), pick(job.exp_avg_sq)))
        grads.append(_gradient(job, lanes, s))
    (reference if impl == "reference" else foreach).clip_(grads, s.clip_value, s.clip_norm)
    first = [m for m, _ in moments]
    foreach.adam_(
        weights,
        grads,
        None if any(m is None for m in first) else [m for m in first if m is not None],
        [v for _, v in moments],
        [job.step for job in jobs],
        lr=s.lr,
        beta1=s.beta1,
        beta2=s.beta2,
        eps=s.eps,
        weight_decay=s.weight_decay,
        decoupled_weight_decay=s.decoupled_weight_decay,
        impl=impl,
    )
    for job, weight, (m, v) in zip(jobs, weights, moments):
        _write_back(job, weight, m, v, s)


def _write_back(job: AdamJob, weight: Tensor, m: Tensor | None, v: Tensor, s: AdamStep) -> None:
    """Put the updated values where they came from; nothing to do where they were updated in place."""
    lanes, p = _lanes(job), job.param.detach()
    partial = lanes.bits is not None
    if partial and not job.compact:
        for full, value in ((job.exp_avg, m), (job.exp_avg_sq, v), (job.master, weight)):
            if full is not None and value is not None:
                lanes.scatter_(full, value)
    if p.dtype == torch.bfloat16 and job.master is None:
        index = lanes.flat_index(p.device) + job.first_index
        weight = reference.stochastic_round_bf16(weight, reference.random_bits16(index, s.seed, job.step))
    if partial:
        lanes.scatter_(p, weight)
    elif p.dtype != work_dtype(p) or job.master is not None:
        p.copy_(weight)
    if job.ema is not None and s.ema is not None:
        source = weight.to(job.ema.dtype)
        if partial and not job.compact:
            lanes.scatter_(job.ema, lanes.gather(job.ema).lerp_(source, 1 - s.ema))
        else:
            job.ema.lerp_(source, 1 - s.ema)
