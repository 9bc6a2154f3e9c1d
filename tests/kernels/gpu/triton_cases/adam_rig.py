"""An Adam step beside its reference in float32 and float64, on tensors surrounded by NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from kernel_gates import check_accuracy
from pecker_kernels import reference
from pecker_kernels.adam.jobs import AdamJob, AdamStep
from pecker_kernels.gpu import adam
from torch import Tensor

SETTINGS = AdamStep(1e-3, 0.9, 0.999, 1e-8, 0.0, False, None, None, None, 0)
GUARD = 16


@dataclass
class Guarded:
    """A tensor `offset` elements into a buffer of NaN."""

    buffer: Tensor
    value: Tensor

    @classmethod
    def make(cls, value: Tensor, offset: int) -> Guarded:
        buffer = value.new_full((value.numel() + 2 * GUARD + offset,), float("nan"))
        view = buffer[GUARD + offset : GUARD + offset + value.numel()].view(value.shape)
        return cls(buffer, view.copy_(value))

    def check(self, what: str) -> None:
        start = self.value.data_ptr() - self.buffer.data_ptr()
        raw = self.buffer.view(torch.uint8)
        clean = torch.full_like(self.buffer, float("nan")).view(torch.uint8)
        end = start + self.value.numel() * self.value.element_size()
        assert torch.equal(raw[:start], clean[:start]), f"written before {what}"
        assert torch.equal(raw[end:], clean[end:]), f"written behind {what}"


def gradient(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Very different sizes, zeros among them."""
    g = torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 6 - 4)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, torch.zeros_like(g), g)


def poison(value: Tensor, lanes: Tensor) -> Tensor:
    """Outside the lanes NaN, which shows where it is read, and .5 in turn, which shows where it is written."""
    turn = torch.arange(value.numel()).view(value.shape) % 2 == 0
    return torch.where(lanes, value, torch.where(turn, float("nan"), 0.5).to(value.dtype))


@dataclass
class One:
    """One tensor: guarded tensors by name, its mask (bool of its shape), the lanes that are updated, the references'
    state."""

    tensors: dict[str, Guarded]
    keep: Tensor
    lanes: Tensor
    bits: Tensor | None
    step: Tensor
    first_index: int
    truth: dict[torch.dtype, dict[str, Tensor]] = field(default_factory=dict)


class Rig:
    """Tensors of `shapes`, stepped by the kernel and by reference.adam_ in float32 and float64.

    density None: no mask. rule: "masked", "both" (masked, with a masked_grad to add) or "differentiated" (grad +
    m ⊙ masked_grad on all weights); has_grad False: masked_grad alone. state: "compact"
    or "dense". Weights, gradients and dense state outside the mask are poisoned. zero: weights start each step from zero, so
    that their accuracy is that of the update (ulps do not see the factor lr). one_sign: no gradient is negative, so that
    exp_avg never cancels: with a common factor on the gradient every implementation rounds it on its own, and where
    that is magnified a luckier peer would say nothing. compact_grads: the gradient, or the masked_grad where there is one,
    is handed over as its kept values.
    """

    def __init__(
        self,
        device: str,
        shapes: Sequence[Sequence[int]],
        settings: AdamStep = SETTINGS,
        *,
        density: float | None = None,
        rule: str = "masked",
        state: str = "compact",
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype = torch.float32,
        master: bool = False,
        exp_avg: bool = True,
        offset: int = 0,
        zero: bool = True,
        one_sign: bool = False,
        has_grad: bool = True,
        compact_grads: bool = False,
        step: Callable[..., None] = adam.step,
    ) -> None:
        self.device, self.settings, self.rule, self.zero, self._step = device, settings, rule, zero, step
        self.one_sign, self.has_grad, self.compact_grads = one_sign, has_grad, compact_grads
        self.compact = state == "compact" and density is not None and rule != "differentiated"
        self.grad_dtype, self.offset = grad_dtype, offset
        self.random = torch.Generator().manual_seed(len(shapes))
        self.cache: dict[Any, Any] = {}
        self.count = 0
        self.ones: list[One] = []
        first = 0
        for shape in shapes:
            keep = torch.rand(shape, generator=self.random) < (1.0 if density is None else density)
            lanes = torch.ones_like(keep) if rule == "differentiated" else keep
            # Away from zero where steps start from them: a step that nearly cancels a weight leaves its rounding alone.
            weights = torch.rand(shape, generator=self.random) + 1
            weights = torch.where(torch.rand(shape, generator=self.random) < 0.5, weights, -weights).to(dtype)
            start = weights[lanes].float()
            tensors = {"param": self._poisoned(weights, lanes)}
            names = ["exp_avg_sq"] + ["exp_avg"] * exp_avg + ["master"] * master + ["ema"] * (settings.ema is not None)
            for name in names:
                value = start if name in ("master", "ema") else torch.zeros_like(start)
                if not self.compact:
                    value = poison(torch.zeros(shape), lanes).masked_scatter_(lanes, value)
                tensors[name] = Guarded.make(value.to(device), offset)
            bits = None if density is None else reference.pack_bits(keep).to(device)
            one = One(tensors, keep, lanes, bits, torch.zeros((), device=device), first)
            for work in (torch.float32, torch.float64):
                one.truth[work] = {name: torch.zeros_like(start, dtype=work) for name in ("exp_avg", "exp_avg_sq")}
                one.truth[work].update(param=start.to(work), ema=start.to(work))
            first += keep.numel()
            self.ones.append(one)

    def _poisoned(self, value: Tensor, lanes: Tensor) -> Guarded:
        return Guarded.make(poison(value, lanes).to(self.device), self.offset)

    def _handed(self, value: Tensor, lanes: Tensor, compact: bool) -> Tensor:
        if compact:
            return Guarded.make(value[lanes].to(self.device), self.offset).value
        return self._poisoned(value, lanes).value

    def _gradient(self, shape: Sequence[int]) -> Tensor:
        g = gradient(shape, self.random).to(self.grad_dtype)
        return g.abs() if self.one_sign else g

    def jobs(self) -> tuple[list[AdamJob], list[Tensor]]:
        """The next step's jobs with fresh gradients, and each one's combined gradient on its lanes in float64."""
        jobs, combined = [], []
        for one in self.ones:
            one.step += 1
            grad = self._gradient(one.keep.shape)
            total = grad.double() * self.has_grad
            more = None
            if self.rule != "masked":
                more = self._gradient(one.keep.shape)
                total = total + torch.where(one.keep, more.double(), 0.0)
                more = self._handed(more, one.keep, self.compact_grads)
            value = {name: t.value for name, t in one.tensors.items()}
            if self.zero:
                for name in {"param", "master"} & value.keys():
                    inside = one.lanes.to(self.device) if value[name].shape == one.lanes.shape else slice(None)
                    value[name][inside] = 0
            jobs.append(
                AdamJob(
                    value["param"],
                    self._handed(grad, one.lanes, self.compact_grads and more is None) if self.has_grad else None,
                    more,
                    one.bits,
                    self.rule == "differentiated",
                    self.compact,
                    value.get("exp_avg"),
                    value["exp_avg_sq"],
                    value.get("master"),
                    value.get("ema"),
                    one.step,
                    one.first_index,
                )
            )
            combined.append(total[one.lanes])
        return jobs, combined

    def step(self) -> None:
        jobs, combined = self.jobs()
        self.count += 1
        before = [{name: t.value.clone() for name, t in one.tensors.items()} for one in self.ones]
        self._step(jobs, self.settings, self.cache)
        self.check_untouched(before)
        for work in (torch.float32, torch.float64):
            self._reference(work, combined)

    def _reference(self, work: torch.dtype, combined: list[Tensor]) -> None:
        s = self.settings
        scale = 1.0 if s.grad_scale is None else float(s.grad_scale)
        grads = [g.to(work) / scale for g in combined]
        reference.clip_(grads, s.clip_value, s.clip_norm)
        for one, g in zip(self.ones, grads):
            mine = one.truth[work]
            if self.zero:
                mine["param"].zero_()
            reference.adam_(
                mine["param"],
                g,
                mine["exp_avg"] if "exp_avg" in one.tensors else None,
                mine["exp_avg_sq"],
                self.count,
                lr=float(s.lr),
                beta1=s.beta1,
                beta2=s.beta2,
                eps=s.eps,
                weight_decay=s.weight_decay,
                decoupled_weight_decay=s.decoupled_weight_decay,
            )
            if s.ema is not None:
                mine["ema"].lerp_(mine["param"], 1 - s.ema)

    def found(self, one: One, name: str) -> Tensor:
        """The kernel's values on the lanes."""
        value = one.tensors[name].value.cpu()
        return value if value.shape != one.lanes.shape or (self.compact and name != "param") else value[one.lanes]

    def check(self) -> None:
        """The accuracy gate on weights and state; where there is a master it is the weights."""
        for i, one in enumerate(self.ones):
            for name in one.tensors.keys() - {"master"}:
                source = "master" if name == "param" and "master" in one.tensors else name
                found = self.found(one, source)
                assert found.numel() == int(one.lanes.sum())
                check_accuracy(found, one.truth[torch.float32][name], one.truth[torch.float64][name])
                if source == "master":
                    weights = self.found(one, "param")
                    assert torch.equal(weights, found.to(weights.dtype)), f"weights {i} are not their master's"
            for name, guarded in one.tensors.items():
                guarded.check(f"{name} {i}")

    def check_untouched(self, before: list[dict[str, Tensor]]) -> None:
        """Weights and dense state outside the lanes have the bits they had."""
        for i, (one, then) in enumerate(zip(self.ones, before)):
            outside = ~one.lanes.to(self.device)
            for name, guarded in one.tensors.items():
                if guarded.value.shape != outside.shape or (self.compact and name != "param"):
                    continue
                now, was = guarded.value[outside], then[name][outside]
                same = torch.equal(now.view(torch.uint8), was.view(torch.uint8))
                assert same, f"{name} {i} was written outside the mask"


def with_settings(**changes: Any) -> AdamStep:
    return replace(SETTINGS, **changes)
