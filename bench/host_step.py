"""What a step of MaskedAdam costs in Python alone: 686 tensors of four weights, kernels that do nothing, beside torch's fused Adam.

    python bench/host_step.py [--impl triton|cpu] [--tensors 686]

triton: in the interpreter, its launches left out; cpu: with the C++ call, which has 2,744 weights to do. "moved": every step finds
its gradients in other memory. Writes bench/results/host_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "host_step.json"


class Nothing:
    """Stands in for a Triton kernel: it is launched, and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **keys: None


def milliseconds(run: Callable[[], object], rounds: int = 40) -> float:
    """The lower quartile: the host is what is measured, and other work only adds."""
    run()
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.quantiles(times, n=4)[0]


def measure(impl: str, tensors: int) -> dict[str, float]:
    import pecker_kernels as pk
    import torch

    torch.set_num_threads(1)
    if impl == "triton":
        from pecker_kernels.gpu import adam, adam_prepare

        adam.adam_kernel = adam_prepare.prepare_kernel = Nothing()
    named = [(f"p{i}", torch.nn.Parameter(torch.randn(4))) for i in range(tensors)]
    sets = [[torch.randn(4) for _ in named] for _ in range(2)]
    for (_, p), g in zip(named, sets[0]):
        p.grad = g
    found: dict[str, float] = {}
    for kind in ("dense", "masked"):
        mask = pk.SaliencyMask.random(named, density=0.5, seed=0) if kind == "masked" else None
        optimizer = pk.MaskedAdam(named, mask, 1e-5, (0.0, 0.999), impl=impl)
        turn = [0]

        def moved(optimizer: Any = optimizer, turn: list[int] = turn) -> None:
            turn[0] ^= 1
            for (_, p), g in zip(named, sets[turn[0]]):
                p.grad = g
            optimizer.step()

        found[f"{kind}, unmoved"] = milliseconds(optimizer.step)
        found[f"{kind}, moved"] = milliseconds(moved)
    found["torch fused"] = milliseconds(torch.optim.Adam([p for _, p in named], 1e-5, fused=True).step)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=("triton", "cpu"), default="triton")
    parser.add_argument("--tensors", type=int, default=686)
    options = parser.parse_args()
    if options.impl == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    found = measure(options.impl, options.tensors)
    for name, ms in found.items():
        print(f"{name}: {ms:.2f} ms")
    kept = (
        json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"command": "python bench/host_step.py --impl IMPL"}
    )
    from pecker_fast.machine.hardware import environment

    kept |= {"machine": environment(), f"{options.impl}, {options.tensors} tensors, ms": found}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
