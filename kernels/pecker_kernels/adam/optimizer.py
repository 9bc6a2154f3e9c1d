"""MaskedAdam: torch.optim.Adam that updates salient weights only, and keeps moments for them alone."""

from __future__ import annotations

import operator
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PeckerKernelsError
from ..mask.saliency import SaliencyMask
from .jobs import AdamJob, AdamStep, refuse_shared
from .lanes import Lanes
from .seen import Seen
from .settings import check_group
from .state import HALF, LaneState
from .step import AdamPlan, choose

Gradients = Mapping[str, Tensor | None] | Sequence[Tensor | None]


def _kind(tensor: Tensor | None) -> Hashable:
    """What the choice of an implementation depends on."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class MaskedAdam(LaneState):
    """Adam (1412.6980) on the weights a mask keeps. All settings live in `param_groups`.

    params: (name, parameter) pairs or groups of them; without a mask plain parameters do as well.
    mask: SaliencyMask covering every parameter given, or None: then this is torch.optim.Adam(fused=True) to the last
    rounding. lr, betas, eps, weight_decay, decoupled_weight_decay: as in torch.optim.Adam. With betas[0] = 0.0 no
    exp_avg is kept.
    clip_value: clamp each element of the (combined) gradient to ±clip_value.
    clip_norm: then scale the group's gradient so that its L2 norm over the updated weights is at most clip_norm.
    ema: decay of an exponential moving average of the weights, None = none; see `ema_weights`.
    master: "fp32" keeps a float32 copy of 16-bit weights; None rounds bfloat16 weights stochastically, as a pure
    function
        of (seed, step, position). float16 weights need "fp32"; float32 and float64 weights ignore it.
    state: "compact" keeps moments (and master, EMA) for salient weights only, 1-D in position order; "dense" for all.
    capturable: the step counters live on the parameters' device in any case; kept for parity with torch.
    impl: "auto" | "triton" | "cpu" | "reference". "auto" takes the kernels of the parameters' device, and torch's own
        operations where those cannot serve (masked weights that are not contiguous, say); a named one is used or raises.
    check_finite: skip the whole step, all groups and their counters, where a gradient that would be read is not finite;
        `skipped` then holds 1.0 (0-dim float32 on the device), else 0.0. Nothing waits for the device.

    Without `masked_grads` a weight outside the mask is never written, weight decay or not; the mask is copied, so only
    `set_mask` changes it. Without check_finite a step on NaN writes NaN. torch.amp.GradScaler is served; masked_grads are
    unscaled and checked here too, unless its `unscale_` was called. Bad arguments raise PeckerKernelsError, a
    ValueError, in torch's words.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        mask: SaliencyMask | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        ema: float | None = None,
        master: str | None = None,
        seed: int = 0,
        state: str = "compact",
        capturable: bool = False,
        impl: str = "auto",
        check_finite: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
            "ema": ema,
            "master": master,
            "seed": seed,
            "state": state,
            "capturable": capturable,
            "impl": impl,
            "check_finite": check_finite,
        }
        check_group(defaults)
        self._take(mask)
        self._lanes: dict[Tensor, Lanes] = {}
        self._plans: dict[int, AdamPlan] = {}
        self._lock = threading.Lock()  # plans and counters are of one step at a time
        self.skipped: Tensor | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; with a mask the parameters must be named and in it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            self._fit(group, self._mask)
        except ValueError:
            self.param_groups.pop()
            raise
        group["mask_sha256"] = self._digest
        group.setdefault("dense_moments", group["state"] == "dense")

    @torch._disable_dynamo  # one opaque call: a compiled training step breaks its graph here, once (torch does so too)
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, masked_grads: Gradients | None = None, closure: Any = None, *, compact_grads: Gradients | None = None
    ) -> Any:
        """One Adam step on the parameters that have a gradient; returns the closure's loss, if there is a closure.

        masked_grads None: weights in the mask are updated from `.grad`, all others are left alone.
        masked_grads given, {name: gradient} or a list in parameter order (None = no gradient): the differentiated rule,
        a dense Adam step on p.grad + m ⊙ masked_grads. Every weight moves then, so the moments become dense whatever
        `state` says, and stay so. Neither `.grad` nor `masked_grads` are changed.
        compact_grads, a mapping or a list in the same way: gradients that stand in for `.grad` in a step without
        masked_grads, where None leaves `.grad` in force. A parameter that has both is refused.

        An entry of either is of the parameter's shape, or compact: 1-D with one value for each weight the mask keeps, in
        position order, as compact state is. The step is the same to the bit. GradScaler looks at `.grad` alone: compact
        gradients are unscaled and checked here like masked_grads, but what is found does not lower its scale, and its
        update() needs some parameter with a `.grad`.
        """
        if callable(masked_grads):  # torch calls step(closure)
            masked_grads, closure = None, masked_grads
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if masked_grads is not None and compact_grads is not None:
            raise PeckerKernelsError(
                "compact_grads stand in for .grad in steps without masked_grads, which may be compact"
            )
        extra = None if masked_grads is None else self._by_param(masked_grads, "masked_grads")
        given = {} if compact_grads is None else self._by_param(compact_grads, "compact_grads")
        with self._lock:
            try:
                self._step_all(given, extra)
            finally:
                # The next backward pass needs the gradients' memory.
                for plan in self._plans.values():
                    plan.cache.pop("ready", None)
                    for job in plan.jobs:
                        job.grad = job.masked_grad = None
        return loss

    def _step_all(self, given: dict[Tensor, Tensor], extra: dict[Tensor, Tensor] | None) -> None:
        """Everything that can be refused is refused before a step is counted or a weight written."""
        work = []
        # A scaler has looked at p.grad alone.
        unseen = (extra is not None or bool(given)) and getattr(self, "found_inf", None) is not None
        for i, group in enumerate(self.param_groups):
            plan = self._plan(i, group, given, extra)
            if plan is not None:
                plan.prepare()
                work.append((plan, self._settings(group, plan.device), group["check_finite"] or unseen))
        self._skip_not_finite(work)
        for plan, settings, _ in work:
            plan.advance(settings)
        for plan, settings, _ in work:
            plan.step(settings)

    def _skip_not_finite(self, work: list[tuple[AdamPlan, AdamStep, bool]]) -> None:
        """Where a gradient that would be read is not finite no group is stepped on."""
        asked = [(plan, settings) for plan, settings, check in work if check]
        if not asked:
            checks = any(group["check_finite"] for group in self.param_groups)
            self.skipped = torch.zeros(()) if checks else None
            return
        found = [plan.not_finite(settings) for plan, settings in asked]
        skip = torch.stack([f.to(found[0].device) for f in found]).any().float()
        for plan, settings, _ in work:
            here, scaler = skip.to(plan.device), settings.found_inf
            settings.found_inf = here if scaler is None else torch.maximum(here, scaler)
        self.skipped = skip

    def _settings(self, group: dict[str, Any], device: torch.device) -> AdamStep:
        # torch.amp.GradScaler hands its scale and its finding over as attributes, the finding summed over devices.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        return AdamStep(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            clip_value=group["clip_value"],
            clip_norm=group["clip_norm"],
            ema=group["ema"],
            seed=group["seed"],
            found_inf=None if found_inf is None else (torch.as_tensor(found_inf, device=device) != 0).float(),
            grad_scale=None if grad_scale is None else grad_scale.to(device),
        )

    def _by_param(self, grads: Gradients, what: str) -> dict[Tensor, Tensor]:
        """Those there are, each of its parameter's shape or compact."""
        named = [(name, p) for name, p, _ in self._named()]
        pairs: list[tuple[str | None, Tensor, Tensor | None]]
        if isinstance(grads, Mapping):
            unknown = set(grads) - {name for name, _ in named}
            if unknown:
                raise PeckerKernelsError(f"{what} names {sorted(unknown)[0]!r}, which is no parameter here")
            pairs = [(name, p, grads.get(name)) for name, p in named if name is not None]
        else:
            if len(grads) != len(named):
                raise PeckerKernelsError(f"{what} has {len(grads)} entries for {len(named)} parameters")
            pairs = [(name, p, g) for (name, p), g in zip(named, grads)]
        return {p: self._fitting(g, p, name, what) for name, p, g in pairs if g is not None}

    def _fitting(self, g: Tensor, p: Tensor, name: str | None, what: str) -> Tensor:
        if g.device != p.device:
            raise PeckerKernelsError(f"{what} of {name!r} is on {g.device}, the parameter on {p.device}")
        if what == "compact_grads" and p.grad is not None and g is not p.grad:
            raise PeckerKernelsError(f"compact_grads names {name!r}, which has a .grad too: set that to None")
        if g.shape == p.shape:
            return g
        lanes = self._lanes_of(p, name) if self._mask is not None else None
        if lanes is None or g.dim() != 1 or g.numel() != lanes.count:
            compact = "" if lanes is None else f", [{lanes.count}] where compact"
            raise PeckerKernelsError(
                f"{what} of {name!r} has shape {list(g.shape)}, the parameter {list(p.shape)}{compact}"
            )
        return g if lanes.bits is not None else g.reshape(p.shape)

    def _plan(
        self,
        i: int,
        group: dict[str, Any],
        given: dict[Tensor, Tensor],
        extra: dict[Tensor, Tensor] | None,
    ) -> AdamPlan | None:
        """The jobs of one group; None where no parameter has a gradient. Jobs of an earlier step are taken up again where only
        gradients have changed."""
        old = self._plans.get(i)
        if old is not None and old.seen is not None and extra is None and not given:
            found = old.seen.still(group, self.state)
            if found is not None:
                old.alike = True
                for job, g in zip(old.jobs, [g for g in found if g is not None]):
                    job.grad = g
                return old
        if extra is not None:
            group["dense_moments"] = True
        more = extra or {}
        grads = {p: given.get(p, p.grad) for p in group["params"]}
        live = [p for p, g in grads.items() if g is not None or p in more]
        if not live:
            return None
        if any(g is not None and g.is_sparse for g in grads.values()):
            raise RuntimeError("MaskedAdam does not support sparse gradients")
        key = (extra is None, group["impl"], *((id(p), _kind(p), _kind(grads[p]), _kind(more.get(p))) for p in live))
        if old is not None and old.key == key and self._same_state(old, group):
            plan = old
        else:
            plan = AdamPlan(self._jobs(group, live, extra is not None, self._first_index(i)), key)
            if old is not None and self._same_state(old, group):
                plan.cache = old.cache  # other gradients of the same tensors: lists of lanes stay what they are
            self._plans[i] = plan
        for job, p in zip(plan.jobs, live):
            job.grad, job.masked_grad = grads[p], more.get(p)
        if plan.which is None:
            refuse_shared(plan.jobs)
            plan.which = choose(group["impl"], plan.jobs)
            if plan.which == "triton":
                self._gather_counters(plan)
        plan.alike = False
        plan.seen = Seen(group, self.state, list(grads.values())) if extra is None and not given else None
        return plan

    def _first_index(self, i: int) -> int:
        """Flat index in the model of a group's first weight."""
        return sum(p.numel() for group in self.param_groups[:i] for p in group["params"])

    def _gather_counters(self, plan: AdamPlan) -> None:
        """Let the counters of a plan lie in one tensor, which one launch moves on; each stays a number of its own to look at."""
        plan.counters = torch.stack([job.step for job in plan.jobs])
        for job, counter in zip(plan.jobs, plan.counters.unbind()):
            job.step = self.state[job.param]["step"] = counter

    def _same_state(self, plan: AdamPlan, group: dict[str, Any]) -> bool:
        average, master = group["ema"] is not None, group["master"] == "fp32"
        moment = group["betas"][0] != 0
        for job in plan.jobs:
            state = self.state[job.param]
            held = (
                state.get("exp_avg_sq"),
                state.get("exp_avg"),
                state.get("ema"),
                state.get("master"),
                state.get("step"),
            )
            mine = (job.exp_avg_sq, job.exp_avg, job.ema, job.master, job.step)
            if not all(map(operator.is_, held, mine)):
                return False
            if (average and job.ema is None) or (moment and job.exp_avg is None):
                return False
            if master and job.master is None and job.param.dtype in HALF:
                return False
        return True

    def _jobs(self, group: dict[str, Any], live: list[Tensor], whole: bool, offset: int) -> list[AdamJob]:
        names = group.get("param_names", [None] * len(group["params"]))
        wanted = set(live)
        jobs = []
        for name, p in zip(names, group["params"], strict=True):
            first, offset = offset, offset + p.numel()
            if p not in wanted:
                continue
            lanes = self._lanes_of(p, name)
            state = self._init_state(p, lanes, group)
            masked = lanes.bits is not None
            jobs.append(
                AdamJob(
                    param=p,
                    grad=None,
                    masked_grad=None,
                    bits=lanes.bits,
                    whole=whole or not masked,
                    compact=masked and not self._is_dense(p),
                    exp_avg=state.get("exp_avg"),
                    exp_avg_sq=state["exp_avg_sq"],
                    master=state.get("master"),
                    ema=state.get("ema"),
                    step=state["step"],
                    first_index=first,
                    kept=lanes,
                )
            )
        return jobs
