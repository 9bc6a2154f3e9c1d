"""Where time and energy go, part by part."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pecker_fast.account.counter import OTHER
from pecker_fast.machine import recording

Meter = Callable[[], float]  # a reading that only grows: seconds, joules


def stopwatch(device: torch.device) -> Meter:
    """Seconds, read when the device has done all it was given."""
    if device.type != "cuda":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def joules(device: torch.device) -> Meter | None:
    """The total energy counter of the GPU (NVML); None on a processor, without `nvidia-ml-py`, or where the GPU has none.

    The counter is of the whole GPU and moves a few times a second: sums over many iterations mean something, one does not.
    """
    if device.type != "cuda":
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except TypeError:  # older bindings want bytes
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # NVML has errors of its own; whatever is wrong, there is nothing to read
        return None

    def read() -> float:
        torch.cuda.synchronize(device)
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    return read


class Clock:
    """A recorder that charges what a meter advances to the innermost part. `laps`: one mapping an iteration."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.laps: list[dict[str, float]] = []
        self._stack: list[str] = []
        self._last = 0.0

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        """One iteration; what happens in no part is charged to `other`."""
        self.laps.append({})
        self._stack, self._last = [OTHER], self.meter()
        with recording(self):
            yield
        self._charge()

    def enter(self, name: str) -> None:
        self._charge()
        self._stack.append(name)

    def leave(self, name: str) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        now = self.meter()
        lap, name = self.laps[-1], self._stack[-1]
        lap[name] = lap.get(name, 0.0) + now - self._last
        self._last = now

    def medians(self) -> dict[str, float]:
        """Median over the laps of each part's total."""
        return {name: statistics.median([lap.get(name, 0.0) for lap in self.laps]) for name in self._names()}

    def means(self) -> dict[str, float]:
        return {name: statistics.fmean([lap.get(name, 0.0) for lap in self.laps]) for name in self._names()}

    def _names(self) -> Sequence[str]:
        return list(dict.fromkeys(name for lap in self.laps for name in lap))
