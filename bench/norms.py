"""GroupNorm and SiLU as one operation against torch's two: by part, and a whole iteration with `engine.norms`, in turns.

    python bench/norms.py [--rounds 15] [--threads 1] [--networks digits,shapes,cifar10]

One process; medians. cifar10 is a random network of that data set's architecture with batch 2. Writes bench/results/norms.json and
prints the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pecker_kernels as pk
import torch
from torch import Tensor
from torch.nn import functional as F

from pecker_fast.machine.hardware import environment
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.benchmark import set_up

RESULTS = Path(__file__).resolve().parent / "results" / "norms.json"
# batch, channels, side, groups: of the digits, the shapes and the CIFAR-10 network
SIZES = ((48, 32, 8, 8), (48, 96, 8, 8), (24, 64, 8, 8), (2, 128, 32, 32), (2, 256, 16, 32), (4, 320, 64, 32))


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other in every round; a first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def parts(size: tuple[int, int, int, int], last: bool, rounds: int) -> dict[str, float]:
    """Milliseconds forward, and forward and back, of one norm and its activation."""
    n, channels, side, groups = size
    torch.manual_seed(0)
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(n, channels, side, side).to(memory_format=order)
    grad = torch.randn(n, channels, side, side).to(memory_format=order)
    weight, bias = torch.randn(channels), torch.randn(channels)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]

    def two(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    def one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pk.group_norm_silu(x, weight, bias, groups)

    def both(make: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(make(*leaves), leaves, grad)

    def forward(make: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: make(x, weight, bias)

    if not torch.allclose(one(x, weight, bias), two(x, weight, bias), atol=1e-5):
        raise SystemExit(f"not timed, {size} differs from torch")
    runs = {
        "forward, torch": forward(two),
        "forward, fused": forward(one),
        "both ways, torch": both(two),
        "both ways, fused": both(one),
    }
    return in_turns(runs, rounds)


def iteration(network: str, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of one iteration with norms plain and fused."""
    keys = ["output=runs/bench", "mask.samples=16"]
    source = network
    if network == "cifar10":
        import diffusers

        from pecker_fast.pretrain.settings import settings_for, unet_config

        config = unet_config(settings_for("cifar10"), 3, 32, 10)
        diffusers.UNet2DModel(**config).save_pretrained(folder / "unet")
        diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
        keys += [f"model={folder}", "batch_size=2", "generator=null", "mask.source=random"]
        source = "digits_plain"
    setups = {kind: set_up(load_recipe(source, [*keys, f"engine.norms={kind}"])) for kind in ("plain", "fused")}
    return in_turns({kind: setup.iterate for kind, setup in setups.items()}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", default="digits,shapes,cifar10")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for size in SIZES:
        for last in (False, True):
            found = parts(size, last, 4 * options.rounds)
            rows.append({"size": size, "channels_last": last, "ms": found})
            ratios = " ".join(
                f"{found[f'{way}, torch'] / found[f'{way}, fused']:.2f} ×" for way in ("forward", "both ways")
            )
            print(f"{size} {'last' if last else 'first'}: {ratios}", flush=True)
    iterations = {}
    for network in options.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            iterations[network] = iteration(network, Path(folder), options.rounds if network != "cifar10" else 3)
        print(network, iterations[network], flush=True)
    command = f"python bench/norms.py --rounds {options.rounds} --threads {options.threads}"
    data = {"command": command, "threads": options.threads, **environment(), "parts": rows, "iterations_ms": iterations}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
