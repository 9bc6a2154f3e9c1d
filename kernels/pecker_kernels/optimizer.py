"""MaskedAdam: torch.optim.Adam that updates salient weights only, and keeps moments for them alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import foreach, reference
from .adam_settings import check_group
from .adam_state import HALF, MOMENTS, LaneState, work_dtype
from .errors import PeckerKernelsError
from .lanes import Lanes
from .mask import SaliencyMask


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
    impl: "auto" | "reference"; others raise PeckerKernelsError.

    Without `masked_grads` a weight outside the mask is never written, weight decay or not. Gradients are not checked: a
    step on NaN writes NaN; ask `all_finite` first. Bad arguments raise PeckerKernelsError, a ValueError, in torch's
    words.
    """

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
        }
        check_group(defaults)
        self._mask = mask
        self._lanes: dict[Tensor, Lanes] = {}
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
        group["mask_sha256"] = self._mask.digest if self._mask is not None else None
        group.setdefault("dense_moments", group["state"] == "dense")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, masked_grads: Mapping[str, Tensor] | Sequence[Tensor | None] | None = None, closure: Any = None
    ) -> Any:
        """One Adam step on the parameters that have a gradient; returns the closure's loss, if there is a closure.

        masked_grads None: weights in the mask are updated from `.grad`, all others are left alone.
        masked_grads given, {name: gradient} or a list in parameter order (None = no gradient): the differentiated rule,
        a dense Adam step on p.grad + m ⊙ masked_grads. Every weight moves then, so the moments become dense whatever
        `state` says, and stay so. Neither `.grad` nor `masked_grads` are changed.
        """
        if callable(masked_grads):  # torch calls step(closure)
            masked_grads, closure = None, masked_grads
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        extra = None if masked_grads is None else self._by_param(masked_grads)
        offset = 0
        for group in self.param_groups:
            offset = self._step_group(group, extra, offset)
        return loss

    def _by_param(self, masked_grads: Mapping[str, Tensor] | Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
        named = [(name, p) for name, p, _ in self._named()]
        pairs: list[tuple[str | None, Tensor, Tensor | None]]
        if isinstance(masked_grads, Mapping):
            unknown = set(masked_grads) - {name for name, _ in named}
            if unknown:
                raise PeckerKernelsError(f"masked_grads names {sorted(unknown)[0]!r}, which is no parameter here")
            pairs = [(name, p, masked_grads.get(name)) for name, p in named if name is not None]
        else:
            if len(masked_grads) != len(named):
                raise PeckerKernelsError(f"masked_grads has {len(masked_grads)} entries for {len(named)} parameters")
            pairs = [(name, p, g) for (name, p), g in zip(named, masked_grads)]
        for name, p, g in pairs:
            if g is not None and g.shape != p.shape:
                raise PeckerKernelsError(
                    f"masked_grads of {name!r} has shape {list(g.shape)}, the parameter {list(p.shape)}"
                )
        return {p: g for _, p, g in pairs if g is not None}

    def _step_group(self, group: dict[str, Any], extra: dict[Tensor, Tensor] | None, offset: int) -> int:
        """Update one group whose first weight has flat index `offset` in the model; returns the next group's offset."""
        names = group.get("param_names", [None] * len(group["params"]))
        clip_value, clip_norm = group["clip_value"], group["clip_norm"]
        beta1, beta2 = group["betas"]
        # The gradient may be overwritten only where it is a copy.
        l2 = group["weight_decay"] and not group["decoupled_weight_decay"]
        copy_grads = bool(clip_value is not None or clip_norm is not None or (l2 and beta1 == 0))
        if extra is not None:
            group["dense_moments"] = True
        jobs = []
        for name, p in zip(names, group["params"]):
            first, offset = offset, offset + p.numel()
            more = extra.get(p) if extra is not None else None
            if p.grad is None and more is None:
                continue
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("MaskedAdam does not support sparse gradients")
            lanes = self._lanes_of(p, name)
            state = self._init_state(p, lanes, group)
            jobs.append((p, self._gradient(p, more, lanes, extra is not None, copy_grads), lanes, state, first))
        if not jobs:
            return offset

        whole = extra is not None  # every weight is updated, not the lanes alone
        weights, moments = [], []
        for p, _, lanes, state, _ in jobs:
            # Rows of the state that belong to the weights updated now; `pick` copies where the state is dense and the
            # update is not.
            pick = lanes.gather if not whole and self._is_dense(p) else (lambda t: t)
            source = pick(state["master"]) if "master" in state else (p.detach() if whole else lanes.gather(p.detach()))
            weights.append(source.to(work_dtype(p)))
            moments.append({key: pick(state[key]) for key in MOMENTS if key in state})
        grads = [grad for _, grad, _, _, _ in jobs]
        steps = [state["step"] for _, _, _, state, _ in jobs]
        torch._foreach_add_(steps, 1)
        reference_only = group["impl"] == "reference"
        (reference if reference_only else foreach).clip_(grads, clip_value, clip_norm)
        foreach.adam_(
            weights,
            grads,
            [m["exp_avg"] for m in moments] if all("exp_avg" in m for m in moments) else None,
            [m["exp_avg_sq"] for m in moments],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            impl=group["impl"],
        )
        for (p, _, lanes, state, first), weight, moment in zip(jobs, weights, moments):
            self._write_back(p, weight, moment, lanes, state, group, whole, first)
        if group["ema"] is not None:
            emas = [state["ema"] for _, _, _, state, _ in jobs]
            sources = [
                state["master"] if "master" in state else self._weights(p, lanes).to(state["ema"].dtype)
                for p, _, lanes, state, _ in jobs
            ]
            torch._foreach_lerp_(emas, sources, 1 - group["ema"])
        return offset

    def _gradient(self, p: Tensor, more: Tensor | None, lanes: Lanes, whole: bool, copy: bool) -> Tensor:
        """The gradient to step on: of all weights where `whole`, else of the lanes."""
        dtype = work_dtype(p)
        if not whole:
            assert p.grad is not None
            grad = lanes.gather(p.grad).to(dtype)
            return grad.clone() if copy and lanes.index is None and dtype == p.grad.dtype else grad
        if more is None:
            assert p.grad is not None
            return p.grad.to(dtype, copy=copy)
        total = torch.zeros_like(p, dtype=dtype) if p.grad is None else p.grad.to(dtype, copy=True)
        if lanes.index is None:
            return total.add_(more)
        return lanes.scatter_(total, lanes.gather(total) + lanes.gather(more).to(dtype))

    def _write_back(
        self,
        p: Tensor,
        weight: Tensor,
        moment: dict[str, Tensor],
        lanes: Lanes,
        state: dict[str, Any],
        group: dict[str, Any],
        whole: bool,
        first: int,
    ) -> None:
        """Put the updated values where they came from; nothing to do where they were updated in place."""
        partial = not whole and lanes.index is not None
        if partial and self._is_dense(p):
            for key, value in moment.items():
                lanes.scatter_(state[key], value)
            if "master" in state:
                lanes.scatter_(state["master"], weight)
        if p.dtype == torch.bfloat16 and "master" not in state:
            index = (Lanes(p.shape, None) if whole else lanes).flat_index(p.device) + first
            weight = reference.stochastic_round_bf16(
                weight, reference.random_bits16(index, group["seed"], state["step"])
            )
        if partial:
            lanes.scatter_(p, weight)
        elif weight.dtype != p.dtype or p.dtype in HALF:
            p.copy_(weight)
