"""Where MaskedAdam keeps its state: which lanes, in which layout, and how both outlive masks, files and optimizers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from ..errors import MaskError, PeckerKernelsError
from ..mask.saliency import SaliencyMask
from .lanes import Lanes
from .settings import DEFAULTS, TORCH_DEFAULTS, check_group
from .step import AdamPlan
from .torch_ops import work_dtype

MOMENTS = ("exp_avg", "exp_avg_sq")
PER_WEIGHT = (*MOMENTS, "master", "ema")
HALF = (torch.bfloat16, torch.float16)


class LaneState(torch.optim.Optimizer):
    """Adam's state for the lanes of a mask. MaskedAdam adds the step.

    state[p]: step (0-dim float32 on the parameter's device), exp_avg (absent with betas[0] = 0.0), exp_avg_sq, and
    master and ema where asked for; all compact, 1-D with one value per lane, or all dense, of the parameter's shape.
    group["dense_moments"]: the layout is dense, because state="dense" or because a step was given masked_grads.
    group["mask_sha256"]: digest of the mask that compact state belongs to.
    """

    _mask: SaliencyMask | None
    _digest: str | None  # of the mask
    _lanes: dict[Tensor, Lanes]
    _plans: dict[int, AdamPlan]
    _lock: threading.Lock
    skipped: Tensor | None

    @property
    def mask(self) -> SaliencyMask | None:
        """The optimizer's own copy."""
        return self._mask

    def _take(self, mask: SaliencyMask | None) -> None:
        """Step by a copy of the mask from now on; it is hashed once."""
        self._mask = None if mask is None else mask.clone()
        self._digest = None if self._mask is None else self._mask.digest

    def _fit(self, group: dict[str, Any], mask: SaliencyMask | None) -> None:
        resolve(group["impl"], *group["params"])
        for p in group["params"]:
            if not p.is_floating_point():
                raise PeckerKernelsError(f"MaskedAdam does not support {p.dtype} parameters")
            if p.dtype == torch.float16 and group["master"] != "fp32":
                raise PeckerKernelsError("float16 weights lose small updates: pass master='fp32'")
        if mask is None:
            return
        if "param_names" not in group:
            raise PeckerKernelsError(
                "a mask goes by name: pass model.named_parameters() (or groups of named parameters)"
            )
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name not in mask.bits:
                raise MaskError(
                    f"parameter {name!r} is not in the mask: leave it out of the optimizer or build a new mask"
                )
            if mask.shapes[name] != p.shape:
                raise MaskError(f"parameter {name!r} has shape {list(p.shape)}, its mask {list(mask.shapes[name])}")

    def _named(self) -> Iterator[tuple[str | None, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, group

    def _lanes_of(self, p: Tensor, name: str | None) -> Lanes:
        lanes = self._lanes.get(p)
        if lanes is None:
            mask = self._mask
            lanes = Lanes(p.shape) if mask is None else Lanes.of(mask, str(name), p.device)
            self._lanes[p] = lanes
        return lanes

    def _is_dense(self, p: Tensor) -> bool:
        return self.state[p]["exp_avg_sq"].shape == p.shape

    def _make_dense(self, p: Tensor, lanes: Lanes) -> None:
        """Compact -> dense: outside the lanes moments have been zero and weights have not moved."""
        state = self.state[p]
        for key in [k for k in (*MOMENTS, "master", "ema") if k in state]:
            full = torch.zeros_like(p, dtype=work_dtype(p))
            if key not in MOMENTS:
                full.copy_(p)
            state[key] = lanes.scatter_(full, state[key])

    def _make_compact(self, p: Tensor, lanes: Lanes) -> None:
        state = self.state[p]
        for key in [k for k in (*MOMENTS, "master", "ema") if k in state]:
            state[key] = lanes.gather(state[key])

    def _init_state(self, p: Tensor, lanes: Lanes, group: dict[str, Any]) -> dict[str, Any]:
        """State of `p`, made or completed for this group's settings."""
        state = self.state[p]
        dense = group["dense_moments"]
        dtype = work_dtype(p)
        if not state:
            like = p if dense or lanes.bits is None else p.new_empty(lanes.count)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            if group["betas"][0] != 0:
                state["exp_avg"] = torch.zeros_like(like, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(like, dtype=dtype)
        elif dense and not self._is_dense(p):
            self._make_dense(p, lanes)
        if group["betas"][0] != 0 and "exp_avg" not in state:
            raise PeckerKernelsError("betas[0] was 0 when the state was made, so there is no exp_avg to go on with")
        if group["master"] == "fp32" and p.dtype in HALF and "master" not in state:
            state["master"] = self._weights(p, lanes).to(dtype).clone()
        if group["ema"] is not None and "ema" not in state:
            source = state["master"] if "master" in state else self._weights(p, lanes)
            state["ema"] = source.detach().to(dtype).clone()
        return state

    def _weights(self, p: Tensor, lanes: Lanes) -> Tensor:
        """The parameter in the layout of its state."""
        return p.detach() if self._is_dense(p) else lanes.gather(p.detach())

    @torch.no_grad()
    def set_mask(self, new_mask: SaliencyMask | None) -> None:
        """Go on with another mask (None = all weights). Moments of lanes that stay are carried over, those of lanes
        that leave are dropped unless the state is dense, and new lanes start from zero: their first steps are up to
        1/√(1-β₂) times longer than a settled lane's, as with torch's Adam on a gradient that has been zero so far.
        """
        for group in self.param_groups:
            self._fit(group, new_mask)
        old = {p: self._lanes_of(p, name) for name, p, _ in self._named()}
        self._take(new_mask)
        self._lanes, self._plans = {}, {}
        for name, p, group in self._named():
            group["mask_sha256"] = self._digest
            if p not in self.state or not self.state[p]:
                continue
            if not self._is_dense(p):
                self._make_dense(p, old[p])
            if not group["dense_moments"]:
                self._make_compact(p, self._lanes_of(p, name))

    @torch.no_grad()
    def ema_weights(self) -> dict[str | int, Tensor]:
        """{name, or position where unnamed: average of the whole tensor, float32 for 16-bit weights}, fresh copies.

        A compact average knows the salient lanes; all other weights have never moved and stand for themselves.
        """
        out: dict[str | int, Tensor] = {}
        for i, (name, p, _) in enumerate(self._named()):
            full = p.detach().to(work_dtype(p), copy=True)
            if "ema" in self.state.get(p, {}):
                if self._is_dense(p):
                    full.copy_(self.state[p]["ema"])
                else:
                    self._lanes_of(p, name).scatter_(full, self.state[p]["ema"])
            out[i if name is None else name] = full
        return out

    @torch.no_grad()
    def densify(self) -> dict[str, Any]:
        """A state_dict that torch.optim.Adam loads: moments of the full shape, zero outside the lanes, in float32 for
        16-bit weights.

        Where betas[0] is 0 exp_avg is zero: torch's next step overwrites it before reading it. Master weights and the
        EMA are not part.
        """
        packed = self.state_dict()
        keep = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "capturable", "params", "param_names")
        groups = [{**TORCH_DEFAULTS, **{k: v for k, v in g.items() if k in keep}} for g in packed["param_groups"]]
        state: dict[int, dict[str, Tensor]] = {}
        for i, (name, p, _) in enumerate(self._named()):
            ours = self.state.get(p)
            if not ours:
                continue
            state[i] = {"step": ours["step"].clone()}
            for key in MOMENTS:
                full = torch.zeros_like(p, dtype=work_dtype(p))
                if key in ours:
                    lanes = Lanes(p.shape) if self._is_dense(p) else self._lanes_of(p, name)
                    lanes.scatter_(full, ours[key])
                state[i][key] = full
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore settings and state saved by MaskedAdam with the same mask, or by torch.optim.Adam.

        Raises MaskError when compact moments belong to another mask, PeckerKernelsError for settings there is no
        counterpart of.
        """
        groups = state_dict["param_groups"]
        if any(group.get(key) for group in groups for key in ("amsgrad", "maximize", "differentiable")):
            raise PeckerKernelsError("amsgrad, maximize and differentiable have no counterpart in MaskedAdam")
        for group in groups:
            check_group({**self.defaults, **group})
        params = list(self._named())
        # State goes by position; torch would take the saved names over, and names choose the bits of the mask.
        own = [str(name) for name, _, _ in self._named()]
        theirs = [name for group in groups for name in group.get("param_names", [])]
        if theirs != own and sorted(theirs) == sorted(own):
            raise PeckerKernelsError("the saved state lists the same parameters in another order")
        ids = [i for group in groups for i in group["params"]]
        mask_of = {i: group.get("mask_sha256") for group in groups for i in group["params"]}
        for i, (name, p, _) in zip(ids, params):
            saved = state_dict["state"].get(i)
            if not saved:
                continue
            if "exp_avg_sq" not in saved or "step" not in saved:
                raise PeckerKernelsError(f"the saved state of parameter {i if name is None else name!r} is not Adam's")
            shape = saved["exp_avg_sq"].shape
            if any(torch.is_tensor(t) and t.shape != shape for key, t in saved.items() if key in PER_WEIGHT):
                raise PeckerKernelsError(f"the saved state of parameter {i if name is None else name!r} is damaged")
            if shape == p.shape:
                continue
            if mask_of[i] != self._digest or shape.numel() != self._lanes_of(p, name).count:
                raise MaskError(
                    f"the saved moments of parameter {i if name is None else name!r} belong to another mask or model: "
                    "build the optimizer with the mask they were saved with"
                )
        renamed = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
        for group, mine in zip(renamed, self.param_groups):
            if "param_names" in mine:
                group["param_names"] = mine["param_names"]
        super().load_state_dict({**state_dict, "param_groups": renamed})
        self._plans = {}
        for group in self.param_groups:
            for key in TORCH_DEFAULTS:
                if key not in DEFAULTS:
                    group.pop(key, None)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.setdefault("dense_moments", group["state"] == "dense")
            group["mask_sha256"] = self._digest
        for i, (name, p, group) in zip(ids, self._named()):
            saved = state_dict["state"].get(i)
            if not saved:
                continue
            # torch casts state to the parameter's dtype, which would round float32 moments of 16-bit weights.
            state = {
                k: torch.as_tensor(v).to(p.device, work_dtype(p), copy=True) for k, v in saved.items() if k != "step"
            }
            state["step"] = torch.as_tensor(saved["step"]).to(p.device, torch.float32, copy=True)
            if group["betas"][0] == 0:
                state.pop("exp_avg", None)
            self.state[p] = state
            lanes = self._lanes_of(p, name)
            if not group["dense_moments"] and self._is_dense(p):
                self._make_compact(p, lanes)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mask": self._mask, "_digest": self._digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lanes, self._plans, self.skipped, self._lock = {}, {}, None, threading.Lock()
        super().__setstate__(state)
