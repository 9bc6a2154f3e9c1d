"""The tables an Adam step over many tensors is launched from, kept between steps and rebuilt only where something moved.

A job table [J, COLUMNS] of addresses, one list of chunks per kernel variant, and room for per-job scalars and partial
sums. Addresses and masks are compared at each step, so a reallocated gradient or a new mask is noticed.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..adam.jobs import AdamJob, alike
from ..errors import PeckerKernelsError
from .adam_lanes import WHOLE, LaneTable, masked_table, ranked_table, whole_table
from .table import upload

# Columns of the job table, int64.
PARAM_AT, GRAD_AT, MORE_AT, BITS, EXP_AVG_AT, EXP_AVG_SQ_AT, MASTER_AT, EMA_AT, STEP_AT, FIRST_INDEX = map(
    tl.constexpr, range(10)
)
COLUMNS = tl.constexpr(10)
# Columns of a chunk list, int64: job, first position, first rank, count (see LaneTable).
CHUNK = tl.constexpr(4)
# Columns of the per-job scalars, float32 (see adam.prepare_kernel).
SCALARS = tl.constexpr(8)
# Optimizers with several parameter groups keep one plan for each; more than this are stale.
KEPT_PLANS = 32

# Address changes that one captured step may make: its finite check and the step itself may each copy gradients.
SPARES = 2

# bfloat16 travels as its bits (see gradstats.as_float).
KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.uint16}


@dataclass(frozen=True, slots=True)
class Variant:
    """What one launch is compiled for. kind: WHOLE, BITMAP or INDEX. param, grad, more: Triton types, None = absent.
    select: masked_grad counts only where bits are set. compact_grads: it, or grad where there is none, holds kept weights
    alone. aligned: every address is a multiple of 16 bytes."""

    kind: int
    compact: bool
    param: Any
    grad: Any
    more: Any
    select: bool
    compact_grads: bool
    exp_avg: bool
    master: bool
    ema: bool
    aligned: bool


@dataclass(slots=True)
class Plan:
    """Tables of one list of jobs. jobs holds the tensors that `table` points to, except the gradients.

    launches: (variant, int64 [C, 4] chunks, first column in `partial`). scalars: float32 [J, 8]. partial: float32
    [2, all chunks]. spares: pinned and device tables for the next address changes under graph capture.
    """

    jobs: list[AdamJob]
    fingerprint: Hashable
    layout: Hashable
    lanes: dict[Hashable, LaneTable]
    launches: list[tuple[Variant, Tensor, int]]
    table: Tensor
    scalars: Tensor
    partial: Tensor
    spares: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def _where(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _mask_identity(bits: Tensor | None) -> Hashable:
    if bits is None:
        return None
    return id(bits), bits.data_ptr(), 0 if bits.is_inference() else bits._version


def _fingerprint(job: AdamJob) -> Hashable:
    tensors = (job.param, job.grad, job.masked_grad, job.exp_avg, job.exp_avg_sq, job.master, job.ema, job.step)
    return (*map(_where, tensors), _mask_identity(job.bits), job.whole, job.compact, job.first_index)


def _like(grad: Tensor | None, job: AdamJob) -> Tensor | None:
    """The gradient in the parameter's memory order, a copy where it has another; a compact one in order."""
    param = job.param
    if grad is not None and job.is_compact(grad):
        return grad.contiguous()
    if grad is None or grad.shape != param.shape or alike(grad, param):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def walkable(jobs: Sequence[AdamJob]) -> list[AdamJob]:
    """The jobs that have weights, with gradients in the memory order of those. Where that takes a copy only the result
    holds it: it must outlive the launches."""
    out = []
    for job in jobs:
        if not job.param.numel():
            continue
        grad, masked_grad = _like(job.grad, job), _like(job.masked_grad, job)
        same = grad is job.grad and masked_grad is job.masked_grad
        out.append(job if same else replace(job, grad=grad, masked_grad=masked_grad))
    return out


def _check(job: AdamJob, device: torch.device) -> None:
    p = job.param
    if p.dtype == torch.float64:
        raise PeckerKernelsError("float64 weights are not served by Triton")
    if p.dtype not in KINDS:
        raise PeckerKernelsError(f"{p.dtype} weights are not served by Triton (float32, bfloat16, float16 are)")
    named = {"grad": job.grad, "masked_grad": job.masked_grad}
    for name, g in named.items():
        compact = job.may_be_compact(name) and job.is_compact(g)
        if g is not None and (g.dtype not in KINDS or not (g.shape == p.shape or compact)):
            raise PeckerKernelsError(
                f"{name} is {g.dtype} {list(g.shape)}: Triton takes float32, bfloat16 or float16 of the weights' shape "
                f"{list(p.shape)}, or compact"
            )
    if job.bits is not None and not p.is_contiguous():
        raise PeckerKernelsError(f"masked weights must be contiguous for Triton, got strides {list(p.stride())}")
    if not p.is_contiguous():
        if not torch.ops.aten.is_non_overlapping_and_dense(p) or job.compact:
            raise PeckerKernelsError(f"weights must be dense in memory for Triton, got strides {list(p.stride())}")
        if p.dtype == torch.bfloat16 and job.master is None:
            raise PeckerKernelsError(
                "stochastic rounding counts weights in row-major order: weights must be contiguous for Triton, got "
                f"strides {list(p.stride())}"
            )
    states = {"exp_avg": job.exp_avg, "exp_avg_sq": job.exp_avg_sq, "master": job.master, "ema": job.ema}
    for name, state in states.items():
        if state is None:
            continue
        if state.dtype != torch.float32:
            raise PeckerKernelsError(f"{name} must be float32, got {state.dtype}")
        walkable = state.is_contiguous() if job.compact else state.shape == p.shape and alike(state, p)
        if not walkable:
            raise PeckerKernelsError(f"{name} {list(state.shape)} must be laid out in memory as the weights are")
    if job.step.dtype != torch.float32:
        raise PeckerKernelsError(f"step must be float32, got {job.step.dtype}")
    for name, tensor in {**named, **states, "step": job.step, "bits": job.bits}.items():
        if tensor is not None and tensor.device != device:
            raise PeckerKernelsError(f"{name} is on {tensor.device}, the first weights are on {device}")


def refusal(jobs: Sequence[AdamJob]) -> str | None:
    """Why the kernels cannot serve these jobs; None where they can."""
    try:
        for job in jobs:
            _check(job, jobs[0].param.device)
    except PeckerKernelsError as error:
        return str(error)
    return None


def _variant(job: AdamJob, lanes: LaneTable) -> Variant:
    more_compact = job.is_compact(job.masked_grad)
    grads = (job.grad, None if more_compact else job.masked_grad)
    tensors = (job.param, *grads, job.exp_avg, job.exp_avg_sq, job.master, job.ema)
    return Variant(
        kind=lanes.kind,
        compact=job.compact and lanes.kind != WHOLE.value,
        param=KINDS[job.param.dtype],
        grad=None if job.grad is None else KINDS[job.grad.dtype],
        more=None if job.masked_grad is None else KINDS[job.masked_grad.dtype],
        select=job.whole and job.bits is not None and job.masked_grad is not None,
        compact_grads=more_compact or job.is_compact(job.grad),
        exp_avg=job.exp_avg is not None,
        master=job.master is not None,
        ema=job.ema is not None,
        # Masked lanes are stored one by one: a layout of one lane per thread joins them into whole sectors, and wide
        # loads would break it up.
        aligned=lanes.kind == WHOLE.value and all(t is None or t.data_ptr() % 16 == 0 for t in tensors),
    )


def _row(job: AdamJob, lanes: LaneTable) -> list[int]:
    source = lanes.source if lanes.source is not None else job.bits
    tensors = (job.param, job.grad, job.masked_grad, source, job.exp_avg, job.exp_avg_sq, job.master, job.ema, job.step)
    return [*(0 if t is None else t.data_ptr() for t in tensors), job.first_index]


def _upload(rows: list[list[int]], device: torch.device) -> Tensor:
    return upload(torch.tensor(rows, dtype=torch.int64), device)


def _lane_table(job: AdamJob, device: torch.device) -> LaneTable:
    if job.whole and job.bits is not None and job.is_compact(job.masked_grad):
        return ranked_table(job.bits, job.param.numel())
    if job.whole or job.bits is None:
        return whole_table(job.param.numel(), device)
    return masked_table(job.bits, job.param.numel())


def _build(
    device: torch.device, variants: Sequence[Variant], tables: Sequence[LaneTable]
) -> tuple[list[tuple[Variant, Tensor, int]], Tensor, Tensor]:
    """(launches, scalars, partial): jobs of one variant share a launch."""
    grouped: dict[Variant, list[Tensor]] = {}
    for i, (variant, lanes) in enumerate(zip(variants, tables)):
        if lanes.chunks.shape[0]:
            chunks = torch.nn.functional.pad(lanes.chunks, (1, 0), value=i)
            grouped.setdefault(variant, []).append(chunks)
    launches: list[tuple[Variant, Tensor, int]] = []
    offset = 0
    for variant, pieces in grouped.items():
        launches.append((variant, torch.cat(pieces), offset))
        # a launch's sums begin at a multiple of 16 bytes: at another place the kernel would be compiled a second time
        offset += -(-launches[-1][1].shape[0] // 4) * 4
    scalars = torch.zeros(len(tables), SCALARS.value, dtype=torch.float32, device=device)
    return launches, scalars, torch.zeros(2, offset, dtype=torch.float32, device=device)


def plan_for(jobs: list[AdamJob], cache: dict[Any, Any]) -> Plan | None:
    """The plan of these walkable jobs from the cache, brought up to date; None where no weight is updated.

    Waits for the device only when masks are new. Under CUDA graph capture the addresses may have changed since the last
    step (gradients of the graph's own pool), the masks and layouts may not: PeckerKernelsError then, as for dtypes,
    layouts and devices that the kernels do not serve.
    """
    if not jobs:
        return None
    slot = ("plan", *(id(job.param) for job in jobs))
    old: Plan | None = cache.get(slot)
    capturing = _capturing(jobs[0].param.device)
    fingerprint = tuple(map(_fingerprint, jobs))
    if old is None or old.fingerprint != fingerprint:
        plan = _renew(jobs, fingerprint, old, capturing)
        if not capturing:  # what is copied under capture only takes effect at replay
            cache[slot] = plan
            plans = [key for key in cache if isinstance(key, tuple) and key[0] == "plan"]
            for key in plans[:-KEPT_PLANS]:
                del cache[key]
    else:
        plan = old
    if capturing:
        # A graph goes on using these buffers after the plan has been replaced.
        cache.setdefault("captured", []).append(replace(plan))
    elif plan.table.is_cuda:
        while len(plan.spares) < SPARES:
            pinned = torch.empty(plan.table.shape, dtype=torch.int64, pin_memory=True)
            plan.spares.append((pinned, torch.empty_like(plan.table)))
    return plan if plan.launches else None


def _renew(jobs: list[AdamJob], fingerprint: Hashable, old: Plan | None, capturing: bool) -> Plan:
    device = jobs[0].param.device
    known = old.lanes if old is not None else {}
    lanes: dict[Hashable, LaneTable] = {}
    tables = []
    for job in jobs:
        _check(job, device)
        masked = job.bits is not None and (not job.whole or job.is_compact(job.masked_grad))
        key = (id(job.param), job.param.numel(), job.whole, masked and _mask_identity(job.bits))
        if key not in known and capturing:
            raise PeckerKernelsError("take one step with these tensors and masks before capturing a CUDA graph")
        lanes[key] = known[key] if key in known else _lane_table(job, device)
        tables.append(lanes[key])
        for g in (job.grad, job.masked_grad):
            if job.is_compact(g) and g is not None and g.numel() != lanes[key].ones:
                raise PeckerKernelsError(f"a compact gradient of {g.numel()} values for {lanes[key].ones} kept weights")
        for state in (job.exp_avg, job.exp_avg_sq, job.master, job.ema) if job.compact else ():
            if state is not None and state.numel() != lanes[key].lanes:
                raise PeckerKernelsError(f"compact state of {state.numel()} values for {lanes[key].lanes} kept weights")
    variants = [_variant(job, table) for job, table in zip(jobs, tables)]
    layout = (tuple(variants), tuple(lanes))
    rows = [_row(job, table) for job, table in zip(jobs, tables)]
    # Gradients are not held: the next backward pass needs their memory.
    jobs = [replace(job, grad=None, masked_grad=None) for job in jobs]
    if old is not None and old.layout == layout:
        launches, scalars, partial, spares = old.launches, old.scalars, old.partial, old.spares
    elif capturing:
        raise PeckerKernelsError("the layout of a tensor changed since the step before capturing a CUDA graph")
    else:
        launches, scalars, partial = _build(device, variants, tables)
        spares = []
    if capturing:
        # The copy out of pinned memory becomes a node of the graph, so neither side may be used by anything else.
        if old is None or not spares:
            raise PeckerKernelsError("take one step between capturing two CUDA graphs")
        pinned, table = spares.pop()
        pinned.copy_(torch.tensor(rows, dtype=torch.int64))
        table.copy_(pinned, non_blocking=True)
        return Plan(jobs, fingerprint, layout, lanes, launches, table, scalars, partial, [(pinned, table)])
    return Plan(jobs, fingerprint, layout, lanes, launches, _upload(rows, device), scalars, partial, spares)


class Recent:
    """The last call's jobs, and where everything lay in memory then."""

    def __init__(self, jobs: Sequence[AdamJob], plan: Plan) -> None:
        self.jobs, self.plan = jobs, plan
        states = ((job.param, job.exp_avg, job.exp_avg_sq, job.master, job.ema, job.step, job.bits) for job in jobs)
        self.fixed = [t for found in states for t in found if t is not None]
        self.addresses = list(map(Tensor.data_ptr, self.fixed))
        self.bits = [job.bits for job in jobs if job.bits is not None and not job.bits.is_inference()]
        self.versions = [bits._version for bits in self.bits]
        self.gradients = _gradients(jobs)

    def unmoved(self, jobs: Sequence[AdamJob]) -> bool:
        return (
            jobs is self.jobs
            and list(map(Tensor.data_ptr, self.fixed)) == self.addresses
            and [bits._version for bits in self.bits] == self.versions
        )


def _gradients(jobs: Sequence[AdamJob]) -> list[int]:
    return [0 if job.grad is None else job.grad.data_ptr() for job in jobs]


def planned(
    jobs: Sequence[AdamJob], cache: dict[Any, Any], alike: bool | None = None
) -> tuple[Plan | None, Sequence[AdamJob]]:
    """(plan, jobs that it walks; they hold copies of gradients, so they must outlive the launches); see `plan_for`, `walkable`.

    alike: since the last call with this cache, of all that decides the plan nothing can have changed but addresses: then those of
    gradients alone are brought up to date, where they have. None: this is not kept for another call.
    """
    if alike and (plan := _as_before(jobs, cache)) is not None:
        return plan, jobs
    walked = walkable(jobs)
    plan = plan_for(walked, cache)
    cache.pop("recent", None)
    same = alike is not None and len(walked) == len(jobs) and all(map(operator.is_, walked, jobs))
    if (
        plan is not None
        and same
        and not any(job.masked_grad is not None for job in jobs)
        and not _capturing(plan.table.device)
    ):
        cache["recent"] = Recent(jobs, plan)
    return plan, walked


def _as_before(jobs: Sequence[AdamJob], cache: dict[Any, Any]) -> Plan | None:
    recent: Recent | None = cache.get("recent")
    if recent is None or not recent.unmoved(jobs) or _capturing(recent.plan.table.device):
        return None
    gradients = _gradients(jobs)
    if gradients != recent.gradients:
        wide = any(variant.aligned for variant, _, _ in recent.plan.launches)
        if cache.get("captured") or (wide and any(address % 16 for address in gradients)):
            return None  # a graph goes on reading this table, and kernels that load wide go on doing so
        plan = recent.plan
        plan.table[:, GRAD_AT.value].copy_(upload(torch.tensor(gradients, dtype=torch.int64), plan.table.device))
        plan.fingerprint = None  # it is of other gradients than the table's
        recent.gradients = gradients
    return recent.plan
