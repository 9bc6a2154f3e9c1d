"""One test, one case: ours and its named peers in one process, interleaved, cold caches, medians.

Every round prepares and times each peer, then two yardsticks of memory, then ours; each run starts after a pass over a
buffer several times the last cache, as after a backward pass. `benchmark` reports ours; the peers, ratios, bytes and
shares are in its extra_info. A case whose correctness gate is red is not timed: the test fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from shapes import TINY
from torch import Tensor

COPY_BYTES = 1 << (20 if TINY else 28)  # of one of the two buffers
EVICT_BYTES = 1 << (20 if TINY else 27)
ROUNDS, SLOW_ROUNDS, WARMUP = (2, 2, 1) if TINY else (20, 5, 2)
COPY, UPDATE = "copy", "update in place"


@dataclass(frozen=True)
class Contender:
    """run: what is timed. prepare: what has to be done before each run and is not timed. result: reads what a run left,
    for gates; None = what `run` returns."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    result: Callable[[], Any] | None = None

    def outcome(self) -> Any:
        """Prepare, run and read."""
        if self.prepare is not None:
            self.prepare()
        found = self.run()
        return found if self.result is None else self.result()


@dataclass(frozen=True)
class Case:
    """ours and peers do the same work. gate: raises AssertionError where ours (or a peer) is wrong on a small copy.

    bytes_moved, flops: the floor of ours. iteration_flops: of one training iteration with one sample, None = no share.
    """

    ours: Contender
    peers: Sequence[Contender]
    gate: Callable[[], None]
    bytes_moved: float
    flops: float
    device: str = "cpu"
    iteration_flops: float | None = None
    rounds: int = ROUNDS
    info: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds of one run: wall clock on the CPU, CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._evict = torch.rand(EVICT_BYTES // 4, device=device)

    def settle(self, contender: Contender) -> None:
        """Prepare a run and fill the caches with something else; read, so that no dirty lines are left to write."""
        if contender.prepare is not None:
            contender.prepare()
        self._evict.sum()

    def measure(self, run: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        # No wait before the first event: the pass over the cache hides the latency of the first launch.
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1e3
    return {f"p{q}_ms": float(values.quantile(q / 100)) for q in (20, 50, 80)}


@lru_cache
def matmul_rate(device: str) -> float:
    """FLOP/s of a large float32 matrix product: no network here trains faster than this."""
    n = 128 if TINY else 2048 if device == "cpu" else 8192
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    clock = Clock(device)
    seconds = [clock.measure(lambda: a @ b) for _ in range(6)][1:]
    return 2 * n**3 / float(torch.tensor(seconds).median())


def pass_gate(case: Case) -> None:
    """Fail the test, before anything is timed, where the implementation to be timed is wrong."""
    try:
        case.gate()
    except AssertionError as error:
        pytest.fail(f"not timed, the correctness gate is red: {error}", pytrace=False)


def compare(benchmark: Any, case: Case) -> None:
    """Gate, then time ours through `benchmark`, with every peer's run between two of ours."""
    pass_gate(case)
    clock = Clock(case.device)
    source = torch.rand(COPY_BYTES // 4, device=case.device)
    target = torch.empty_like(source)
    # A copy also fetches the lines it overwrites, which its byte count leaves out; an update in place does not.
    yardsticks = [Contender(COPY, lambda: target.copy_(source)), Contender(UPDATE, lambda: target.mul_(1.0))]
    peers = [*case.peers, *yardsticks]
    times: dict[str, list[float]] = {c.name: [] for c in (case.ours, *peers)}
    assert len(times) == len(peers) + 1, "contenders need names of their own"

    def others() -> None:
        for peer in peers:
            clock.settle(peer)
            times[peer.name].append(clock.measure(peer.run))
        clock.settle(case.ours)

    def ours() -> None:
        times[case.ours.name].append(clock.measure(case.ours.run))

    benchmark.pedantic(ours, setup=others, rounds=case.rounds, warmup_rounds=WARMUP)
    kept = {name: percentiles(seconds[-case.rounds :]) for name, seconds in times.items()}
    benchmark.extra_info.update(report(case, kept))


def report(case: Case, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a result file says of one case, apart from the fixture's own statistics of ours."""
    ours = times[case.ours.name]
    seconds = ours["p50_ms"] / 1e3
    copy, update = (2 * COPY_BYTES / (times[name]["p50_ms"] / 1e3) for name in (COPY, UPDATE))
    rate = case.bytes_moved / seconds
    share = None
    if case.iteration_flops is not None:
        share = seconds / (seconds + case.iteration_flops / matmul_rate(case.device))
    return {
        **case.info,
        "ours": ours,
        "peers": {p.name: times[p.name] for p in case.peers},
        "ratios": {p.name: times[p.name]["p50_ms"] / ours["p50_ms"] for p in case.peers},
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "bytes_per_s": rate,
        "copy_bytes_per_s": copy,
        "update_bytes_per_s": update,
        "share_of_copy_bandwidth": rate / copy,
        "share_of_update_bandwidth": rate / update,
        # The iteration is put at its matrix products at full speed, so the true share is smaller.
        "share_of_iteration_at_most": share,
    }


def live_lines(masks: Sequence[Tensor], line_bytes: int, value_bytes: int = 4) -> int:
    """Cache lines (or sectors) of a tensor list in which some value is kept."""
    width = line_bytes // value_bytes
    total = 0
    for keep in masks:
        flat = keep.reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % width))
        total += int(flat.view(-1, width).any(1).sum())
    return total
