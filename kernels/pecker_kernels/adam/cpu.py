"""The door to csrc/adam.cpp: one call for all tensors of an Adam step."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..errors import MaskError, NativeLibraryError
from .jobs import AdamJob, AdamStep, alike
from .lanes import STALE

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# The columns of AdamTensor in csrc/adam.h; masked_grad's follow grad's.
_GRAD, _N, _WHOLE, _GRAD_COMPACT, _GRAD_DTYPE, _COLUMNS = 1, 10, 12, 14, 17, 19


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_double) for name in ("clip_value", "grad_factor", "grad_scale", "ema_weight")),
        ("decoupled", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
    )


class _Stats(ctypes.Structure):
    _fields_ = (("square_sum", ctypes.c_double), ("finite", ctypes.c_int64))


def _state(job: AdamJob) -> list[Tensor]:
    return [t for t in (job.exp_avg, job.exp_avg_sq, job.master, job.ema) if t is not None]


def refusal(jobs: Iterable[AdamJob]) -> str | None:
    """Why the C++ step cannot serve these jobs; None where it can."""
    for job in jobs:
        p = job.param
        given = [t for t in (p, job.grad, job.masked_grad, job.bits, *_state(job)) if t is not None]
        if any(t.device.type != "cpu" for t in given):
            return f"takes CPU tensors, got {sorted({str(t.device) for t in given})}"
        if any(t.dtype not in DTYPES for t in given if t is not job.bits):
            return f"does not know {sorted({str(t.dtype) for t in given if t.dtype not in DTYPES})}"
        if not p.is_contiguous() and (job.bits is not None or not torch.ops.aten.is_non_overlapping_and_dense(p)):
            return "takes contiguous weights under a mask, and weights that are dense in memory without one"
        if any(t.numel() and not t.data_ptr() for t in given):
            return f"takes tensors with memory of their own, got {type(p).__name__}"
        if p.dtype == torch.bfloat16 and job.master is None and not p.is_contiguous():
            return "rounds bfloat16 weights by their row-major position, and takes them contiguous"
        work = torch.float64 if p.dtype == torch.float64 else torch.float32
        if any(t.dtype != work for t in _state(job)):
            return f"keeps the state of {p.dtype} weights in {work}"
        if any(not (t.is_contiguous() if job.compact else alike(t, p)) for t in _state(job)):
            return "takes state that lies in memory like its weights"
        if p.dtype == torch.float16 and job.master is None:
            return "steps on float16 weights with a float32 master only"
    return None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _fixed_row(job: AdamJob) -> list[int]:
    rank = None if job.bits is None else job.lanes.rank()
    return [
        _pointer(job.param), 0, 0, _pointer(job.bits), _pointer(rank),
        _pointer(job.exp_avg), _pointer(job.exp_avg_sq), _pointer(job.master), _pointer(job.ema), _pointer(job.step),
        job.param.numel(), job.first_index, int(job.whole), int(job.compact), 0, 0, DTYPES[job.param.dtype], 0, 0,
    ]  # fmt: skip


class _Table:
    """The rows of a list of jobs; what does not change from step to step is kept."""

    def __init__(self, jobs: Sequence[AdamJob]) -> None:
        self.jobs = jobs  # keeps alive what the rows point to
        self.plain = False  # no gradient had to be copied, and there is one of each job at most
        self.fixed = [t for job in jobs for t in (job.param, job.step, *_state(job))]
        self.addresses = self._addresses()
        self.rows = np.array([_fixed_row(job) for job in jobs], dtype=np.int64).reshape(-1, _COLUMNS)

    def _addresses(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self.fixed)), list(map(Tensor.numel, self.fixed))

    def fits(self, jobs: Sequence[AdamJob]) -> bool:
        """Whether these are the jobs it was made for and nothing was moved; jobs are changed in their gradients only."""
        return jobs is self.jobs and self.addresses == self._addresses()

    def fill(self, jobs: Sequence[AdamJob], same: bool = False) -> list[Tensor]:
        """Point the rows at this step's gradients; returns what must live until the call is done. same: of the kind they were of
        the last time."""
        if same and self.plain and not any(job.grad.is_neg() for job in jobs if job.grad is not None):
            self.rows[:, _GRAD] = [_pointer(job.grad) for job in jobs]
            return []  # the jobs hold them
        held: list[Tensor] = []

        def laid_out(g: Tensor, p: Tensor, compact: bool) -> Tensor:
            g = g.resolve_neg()
            if compact:
                return g.contiguous()
            return g if alike(g, p) else torch.empty_like(p, dtype=g.dtype).copy_(g)

        for i, which in enumerate(("grad", "masked_grad")):
            grads = [getattr(job, which) for job in jobs]
            compact = [job.is_compact(g) for g, job in zip(grads, jobs)]
            ready = [None if g is None else laid_out(g, job.param, c) for g, job, c in zip(grads, jobs, compact)]
            held += [g for g in ready if g is not None]
            self.rows[:, _GRAD + i] = [0 if g is None else g.data_ptr() for g in ready]
            self.rows[:, _GRAD_COMPACT + i] = compact
            self.rows[:, _GRAD_DTYPE + i] = [0 if g is None else DTYPES[g.dtype] for g in ready]
            copied = any(map(operator.is_not, ready, grads))
            self.plain = not copied and (i == 0 or self.plain) and (i == 0 or not any(g is not None for g in grads))
        return held


def _settings(s: AdamStep, factor: float = 1.0) -> _Settings:
    return _Settings(
        float(s.lr), s.beta1, s.beta2, s.eps, s.weight_decay,
        math.inf if s.clip_value is None else s.clip_value, factor,
        1.0 if s.grad_scale is None else float(s.grad_scale), 0.0 if s.ema is None else 1.0 - s.ema,
        int(s.decoupled_weight_decay), s.seed,
    )  # fmt: skip


def _table(jobs: Sequence[AdamJob], cache: dict[str, Any]) -> _Table:
    table = cache.get("cpu")
    if table is not None and cache.get("ready") is jobs:  # looked at in this very step
        return table
    if table is None or not table.fits(jobs):
        for job in jobs:
            job.check()
        reason = refusal(jobs)
        if reason is not None:
            raise NativeLibraryError(f"the C++ Adam {reason}")
        table = cache["cpu"] = _Table(jobs)
    return table


def _done(status: int) -> None:
    if status:
        raise MaskError(STALE)


def _stats(rows: np.ndarray, settings: _Settings) -> _Stats:
    result = _Stats()
    status = native.library().pecker_grad_stats(
        rows.ctypes.data, len(rows), ctypes.byref(settings), ctypes.byref(result), torch.get_num_threads()
    )
    _done(status)
    return result


def grad_stats(jobs: Sequence[AdamJob], settings: AdamStep, cache: dict[str, Any]) -> tuple[float, bool]:
    """(sum of squares, all finite) of the gradients that `step` would take on the updated weights, clamped but not yet
    scaled. The sum is in float64 and the same on any number of threads."""
    table = _table(jobs, cache)
    held = table.fill(jobs)
    result = _stats(table.rows, _settings(settings))
    del held
    return result.square_sum, bool(result.finite)


def prepare(jobs: Sequence[AdamJob], cache: dict[str, Any]) -> None:
    """Raise now what `step` would raise. Until `cache["ready"]` is taken out nothing but gradients may change."""
    _table(jobs, cache)
    cache["ready"] = jobs


def advance(jobs: Sequence[AdamJob], cache: dict[str, Any]) -> None:
    """Count one step on each job's counter."""
    table = _table(jobs, cache)
    native.library().pecker_advance(table.rows.ctypes.data, len(table.rows))


def step(jobs: Sequence[AdamJob], settings: AdamStep, cache: dict[str, Any], alike: bool = False) -> None:
    """Carry out the jobs. cache: a dict the caller keeps for these jobs between steps. alike: gradients are of the kind they were.

    Raises NativeLibraryError where `refusal` gives a reason.
    """
    if settings.found_inf is not None and float(settings.found_inf) != 0:
        return
    table = _table(jobs, cache)
    held = table.fill(jobs, alike)
    factor = 1.0
    if settings.clip_norm is not None:
        norm = math.sqrt(_stats(table.rows, _settings(settings)).square_sum)
        factor = min(1.0, settings.clip_norm / (norm + 1e-6)) if not math.isnan(norm) else math.nan
    status = native.library().pecker_adam(
        table.rows.ctypes.data, len(table.rows), ctypes.byref(_settings(settings, factor)), torch.get_num_threads()
    )
    del held
    # The write happened behind autograd's back.
    torch.autograd.graph.increment_version([job.param for job in jobs])
    _done(status)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value of these CPU tensors of any floating dtype is NaN or inf."""
    rows = np.zeros((len(tensors), _COLUMNS), dtype=np.int64)
    held = [t.detach().resolve_neg().contiguous() for t in tensors]
    wide = [DTYPES[torch.float64 if t.dtype == torch.float64 else torch.float32] for t in held]
    rows[:, _GRAD] = [t.data_ptr() for t in held]
    rows[:, _N] = [t.numel() for t in held]
    rows[:, _WHOLE] = 1
    rows[:, _GRAD_DTYPE - 1] = wide
    rows[:, _GRAD_DTYPE] = [DTYPES[t.dtype] for t in held]
    return bool(_stats(rows, _Settings(clip_value=math.inf, grad_factor=1.0, grad_scale=1.0)).finite)
