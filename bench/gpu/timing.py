"""Times on a GPU: what a caller waits for, and the device's work alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pecker_kernels as pk
import torch
from rows import put
from shapes import TINY, sd15
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = DEVICE == "cuda"
FLUSH = 1 << (26 if CUDA else 12)  # values that push everything else out of the caches
Named = list[tuple[str, torch.nn.Parameter]]


class Bench:
    """Measures into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._flush = torch.rand(FLUSH, device=DEVICE)

    def put(self, **row: Any) -> None:
        put(self.folder, **row)

    def host_ms(self, run: Callable[[], object], rounds: int = 10, warm: int = 2) -> float:
        """Median of one call after a pass over 256 MiB, host work included where it shows."""
        found = []
        for i in range((rounds if CUDA else 1) + warm):
            if CUDA:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                self._flush.sum()
                begin.record()
                run()
                end.record()
                torch.cuda.synchronize()
                ms = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                run()
                ms = 1e3 * (time.perf_counter() - start)
            if i >= warm:
                found.append(ms)
        return statistics.median(found)

    def graph_ms(self, run: Callable[[], object], rounds: int = 8) -> float | str | None:
        """The device's work alone: one CUDA graph of the call, replayed; a text where it cannot be captured."""
        if not CUDA:
            return None
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
                run()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            return self.host_ms(graph.replay, rounds)
        except Exception as error:  # whatever it is, the next figure is worth having
            return f"no graph: {type(error).__name__}: {str(error)[:160]}"

    def kernels_us(self, run: Callable[[], object]) -> list[tuple[str, float, int]] | str | None:
        """(kernel, microseconds, calls) of one call, the eight longest."""
        if not CUDA:
            return None
        from torch.profiler import ProfilerActivity, profile

        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        rows = [(e.key[:60], round(e.self_device_time_total, 1), e.count) for e in seen.key_averages()]
        return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])[:8]

    def measure(
        self, what: str, run: Callable[[], object], bytes_moved: float | None = None, *, graph: bool = True, profile: bool = False,
        rounds: int = 10, **more: Any,
    ) -> float | None:  # fmt: skip
        """One row: both times, TB/s. Returns the device's milliseconds, without a graph the host's; None where it fails."""
        try:
            host = self.host_ms(run, rounds)
            device = self.graph_ms(run) if graph else None
            best = device if isinstance(device, float) else host
            self.put(
                what=what, host_ms=round(host, 4), device_ms=round(device, 4) if isinstance(device, float) else device,
                tb_s=round(bytes_moved / best / 1e9, 3) if bytes_moved else None,
                kernels=self.kernels_us(run) if profile else None, **more,
            )  # fmt: skip
            return best
        except Exception as error:  # one figure that cannot be had is a row as well
            self.put(what=what, error=f"{type(error).__name__}: {str(error)[:300]}", **more)
            return None


def free() -> None:
    if CUDA:
        torch.cuda.empty_cache()


def parameters() -> tuple[Named, int]:
    """SD 1.5's 686 tensors with gradients, and how many weights they are."""
    shapes = [(n, tuple(min(x, 8) for x in s)) for n, s in sd15()[::20]] if TINY else list(sd15())
    named = [(name, torch.nn.Parameter(torch.randn(shape, device=DEVICE) * 0.02)) for name, shape in shapes]
    for _, p in named:
        p.grad = torch.randn_like(p)
    return named, sum(math.prod(shape) for _, shape in shapes)


def random_mask(
    named: Sequence[tuple[str, Tensor]], density: float, structure: str, tile: tuple[int, int] = (128, 128)
) -> Any:
    """Made on the device: SaliencyMask.random draws its numbers on one core."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def score(p: Tensor) -> Tensor:
        if structure == "row" and p.dim():
            rows = torch.rand(p.shape[0], *(1,) * (p.dim() - 1), device=DEVICE, generator=draw)
            return rows.expand(p.shape).contiguous()
        return torch.rand(p.shape, device=DEVICE, generator=draw)

    scores = {name: score(p) for name, p in named}
    return pk.SaliencyMask.from_scores(scores, density=density, structure=structure, tile=tile)
