"""One iteration of an engine and its state, part by part: counted once, timed over a few."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pecker_kernels import MaskedAdam
from pecker_kernels.cost import CHECK_FLOPS, Cost, step_cost
from pecker_kernels.torch_library.adam import EMA_FLOPS
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pecker_fast.account.clock import Clock, stopwatch
from pecker_fast.account.counter import Count, Counter
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.machine import part, recording

BACKWARD = "generator_backward"  # what the parts of θ's backward passes are called, the branches after it
GROUPS = ("retain", "forget", "retain_forget")
FORMULAS = ("score_optimizer", "generator_optimizer", "finite_check", "ema")
TIMED = 5  # iterations a run times, after the counted one

Account = dict[str, Any]  # as it stands in metrics.json; docs/design/0001-architecture.md


class Steps:
    """Stands in for the optimizers of a state: a step is not taken, its cost is written down."""

    def __init__(self, state: TrainState) -> None:
        self.optimizers = {
            "score_optimizer": [] if state.score_optimizer is None else [state.score_optimizer],
            "generator_optimizer": list(state.updates.optimizers.values()),
        }
        self.costs = dict.fromkeys(self.optimizers, Cost(0, 0))
        self.dense = dict.fromkeys(self.optimizers, Cost(0, 0))
        self.gradient_bytes = 0  # the most that was handed to one step
        self.checked = Cost(0, 0)  # what looking at every gradient for NaN takes

    @contextlib.contextmanager
    def not_taken(self) -> Iterator[None]:
        every = [(name, optimizer) for name, optimizers in self.optimizers.items() for optimizer in optimizers]
        for name, optimizer in every:
            optimizer.step = partial(self._note, name, optimizer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for _, optimizer in every:
                del optimizer.step

    def _note(
        self, name: str, optimizer: MaskedAdam, masked_grads: Any = None, closure: Any = None, compact_grads: Any = None
    ) -> None:
        with _disable_current_modes():  # counting live lines is no work of the step's
            self.costs[name] += step_cost(optimizer, masked_grads, compact_grads=compact_grads)
            if not self.dense[name].flops:  # one step of all weights, however many steps a rule takes
                self.dense[name] = step_cost(optimizer, dense=True)
        extra = [
            g
            for given in (masked_grads, compact_grads)
            for g in (given.values() if isinstance(given, Mapping) else given or ())
        ]
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.gradient_bytes = max(self.gradient_bytes, unique_bytes([*grads, *extra]))
        given = [g for g in (*grads, *extra) if g is not None]
        self.checked += Cost(CHECK_FLOPS * sum(g.numel() for g in given), sum(g.nbytes for g in given))


def unique_bytes(tensors: list[Tensor | None]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {s._cdata: s.nbytes() for t in tensors if t is not None for s in [t.untyped_storage()]}
    return sum(storages.values())


def optimizer_bytes(optimizer: MaskedAdam) -> int:
    """Moments, masters and averages, and the bits of the lanes."""
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return unique_bytes([*state, *(optimizer._lanes_of(p, name).bits for name, p, _ in optimizer._named())])


def state_tensors(state: TrainState) -> list[Tensor]:
    """Everything that is alive between iterations."""
    networks = state.networks_by_name.values()
    tensors: list[Tensor] = [p for network in networks for _, p in network.named_parameters()]
    tensors += [
        t for o in state.optimizers.values() for s in o.state.values() for t in s.values() if isinstance(t, Tensor)
    ]
    tensors += [*(state.ema or {}).values(), *state.teacher.beside()]
    tensors += state.adversary.held() if state.adversary is not None else ()
    tensors += state.pool.tensors().values() if state.pool is not None else ()
    tensors += state.anchor.tensors() if state.anchor is not None else ()
    return [*tensors, *(state.mask.bits.values() if state.mask is not None else ())]


def counted(engine: LocalEngine, state: TrainState, allocator: torch.device | None = None) -> Account:
    """The account, without times, of the iteration that comes next: a rehearsal of it, after which the state is as before.

    Nothing promises that torch rounds alike under a dispatch mode (FlopCounterMode does not), so what is counted must not be
    what trains. Moments are only in the account if a step has been taken before.
    """
    weights = {
        f"{key}.{name}": p for key, network in state.networks_by_name.items() for name, p in network.named_parameters()
    }
    counter, steps = Counter(weights, state_tensors(state), allocator), Steps(state)
    images = state.images
    limited = {group for group in GROUPS if engine.live.of(state, group.split("_")) is not None}
    undone = engine.attacks.undone(state)
    with engine.uncompiled(), engine.guard.ignored(), steps.not_taken(), undone, recording(counter), counter:
        engine.attacks.step(state)
        engine.score_step(state)
        engine.generator_step(state)
        with part("ema"):  # by formula, as the steps
            pass
    state.images = images
    return _account(state, counter, steps, limited)


def _account(state: TrainState, counter: Counter, steps: Steps, limited: set[str]) -> Account:
    """limited: groups of branches whose weight gradients are those of live rows already."""
    generator = dict(state.generator.named_parameters())
    n = sum(p.numel() for p in generator.values())
    formulas = dict(steps.costs)
    formulas["finite_check"] = steps.checked if "finite_check" in counter.parts else Cost(0, 0)
    formulas["ema"] = Cost(EMA_FLOPS * n, 12 * n) if state.ema is not None else Cost(0, 0)
    parts: dict[str, dict[str, Any]] = {}
    for name, count in counter.parts.items():
        cost = formulas.get(name, Cost(count.flops, count.bytes_moved))
        parts[name] = {"flops": cost.flops, "bytes": cost.bytes_moved, "peak_tensor_bytes": count.peak_tensor_bytes}
        if count.weight_gradients:
            parts[name]["weight_gradient_flops"] = sum(count.weight_gradients.values())
        if count.peak_allocated_bytes:
            parts[name]["peak_allocated_bytes"] = count.peak_allocated_bytes
    backward = {name: count for name, count in counter.parts.items() if name.startswith(BACKWARD)}
    all_weights = counter.parts.get("generator_forward", Count()).weight_flops
    ran = sum(sum(count.weight_gradients.values()) for count in backward.values())
    inputs = sum(count.flops for count in backward.values()) - ran
    optimizers, dense = steps.optimizers, steps.dense["generator_optimizer"]
    account: Account = {
        "parts": parts,
        "masked": state.mask is not None,
        "counted_flops": counter.total_flops,
        "flops": sum(one["flops"] for one in parts.values()),
        "bytes": sum(one["bytes"] for one in parts.values()),
        "formulas": [name for name in FORMULAS if name in parts],
        "peak_tensor_bytes": counter.live.peak,
        "optimizer_state_bytes": {
            "score": sum(map(optimizer_bytes, optimizers["score_optimizer"])),
            "generator": sum(map(optimizer_bytes, optimizers["generator_optimizer"])),
        },
        "gradient_bytes": steps.gradient_bytes,
        "generator_backward": {
            "input_flops": inputs,
            "weight_gradient_flops": ran,
            "dense_weight_gradient_flops": all_weights,
            "live_weight_gradient_flops": _needed(backward, state, limited, generator),
        },
        "dense": {  # the same iteration without a mask, where it is known without running it
            BACKWARD: {"flops": inputs + all_weights},
            "generator_optimizer": {"flops": dense.flops, "bytes": dense.bytes_moved},
        },
    }
    peaks = [one.get("peak_allocated_bytes") for one in parts.values()]
    account["peak_allocated_bytes"] = max((p for p in peaks if p is not None), default=None)
    return account


def _needed(backward: dict[str, Count], state: TrainState, limited: set[str], generator: Mapping[str, Tensor]) -> float:
    """FLOPs of the weight gradients the rule reads: of rows (output channels) in which the mask keeps a weight.

    A dense branch needs all of them: `differentiated` masks the forget branch alone, and so does `alternating`.
    """
    mask, separate = state.mask, state.updates.separate
    live: dict[str | tuple[int, ...], list[float]] = {}
    for name, p in generator.items():
        if mask is None or p.dim() < 2 or name not in mask.shapes:  # adapters need all of theirs
            continue
        share = float(mask.bool(name).reshape(p.shape[0], -1).any(1).float().mean())
        live[f"generator.{name}"] = [share]
        if p.dim() == 2:  # linear layers are known by shape alone, so those of one shape share their mean
            for shape in {tuple(p.shape), tuple(p.shape)[::-1]}:
                live.setdefault(shape, []).append(share)
    total = 0.0
    for name, count in backward.items():
        dense_branch = name != f"{BACKWARD}_forget" and (separate or name == f"{BACKWARD}_retain")
        whole = dense_branch or name.removeprefix(f"{BACKWARD}_") in limited
        for key, flops in count.weight_gradients.items():
            shares = [1.0] if whole else live.get(key, [1.0])
            total += flops * sum(shares) / len(shares)
    return total


def add_times(account: Account, clock: Clock) -> None:
    """Milliseconds of each part, medians over the laps, and each part's share of their sum."""
    medians = clock.medians()
    whole = sum(medians.values())
    for name, seconds in medians.items():
        one = account["parts"].setdefault(name, {"flops": 0, "bytes": 0, "peak_tensor_bytes": 0})
        one |= {"ms": 1e3 * seconds, "share": seconds / whole if whole else 0.0}
    account["iteration_ms"] = 1e3 * whole
    account["iterations_timed"] = len(clock.laps)


class Accountant:
    """Keeps the books of one stage in `state.accounts`: after the first iteration that this process does one is rehearsed
    and counted, the next few are timed, all others are left alone. None of it changes what they compute. Of a sharded
    engine no books are kept."""

    def __init__(self, engine: LocalEngine, state: TrainState) -> None:
        self.engine, self.state = engine, state
        self._clock = Clock(stopwatch(engine.device))
        self._account: Account | None = None
        self._spent_s = 0.0

    def spent_s(self) -> float:
        """Seconds that went into the books, and not into an iteration, since this was asked last."""
        spent, self._spent_s = self._spent_s, 0.0
        return spent

    def run(self, iterate: Callable[[], Any]) -> Any:
        if self.engine.sharded:  # a rehearsal that takes no step would leave DeepSpeed in the middle of one
            self.state.flops_per_iteration.setdefault(self.state.stage, 0.0)
            return iterate()
        if self._account is None:
            result = iterate()
            meter = stopwatch(self.engine.device)
            start = meter()
            self._account = counted(self.engine, self.state)
            self._spent_s += meter() - start
            self.state.accounts[self.state.stage] = self._account
            self.state.flops_per_iteration.setdefault(self.state.stage, float(self._account["counted_flops"]))
            return result
        # A CUDA graph has no parts, and while it is captured nothing may wait for the device.
        if self.engine.graph is not None or len(self._clock.laps) == TIMED:
            return iterate()
        with self._clock.lap():
            result = iterate()
        add_times(self._account, self._clock)
        return result
