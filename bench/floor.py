"""How far an iteration on the digits is from what this machine can do: large matrix products, memory, each convolution alone.

    python bench/floor.py             # writes bench/results/floor_digits.json; tables.py puts it into docs/performance.md
    python bench/floor.py --quick     # seconds: shows that it works, times nothing

Three bounds to hold an iteration against:
* products: its FLOPs (convolutions, matrix products) at the speed of a large float32 matrix product, which a convolution that
  saves multiplications (Winograd) can exceed;
* memory: what optimizers, finite checks and average must move, at the bandwidth of a copy;
* layers: every convolution forward, to its input and to its weights, alone and warm, as often as an iteration runs it. What an
  iteration takes beyond it is everything that is no convolution: norms, activations, attention, Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import PlainLoop
from torch import Tensor, nn

from pecker_fast.account import counted
from pecker_fast.machine.hardware import environment
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.benchmark import Setup, set_up

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "floor_digits.json"
# Passes of an iteration over the batch of both branches: θ, ψ in the score step, θ, φ, ψ in the generator step; back to the
# input through all but the first; to the weights of ψ and θ.
PASSES = {"forward": 5, "input": 4, "weight": 2}
Run = Callable[[], object]


def median_s(run: Run, rounds: int) -> float:
    for _ in range(min(2, rounds)):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peaks(quick: bool) -> dict[str, float]:
    """FLOP/s of a large product, bytes/s of a copy and of an update in place."""
    n, size = (256, 1 << 18) if quick else (2048, 1 << 26)
    a, b, c = (torch.rand(n, n) for _ in range(3))
    source = torch.rand(size)
    target = torch.empty_like(source)
    rounds = 2 if quick else 15
    return {
        "sgemm_flops_per_s": 2 * n**3 / median_s(lambda: torch.mm(a, b, out=c), rounds),
        "copy_bytes_per_s": 2 * source.nbytes / median_s(lambda: target.copy_(source), rounds),
        "update_bytes_per_s": 2 * source.nbytes / median_s(lambda: target.mul_(1.0), rounds),
    }


def convolutions(setup: Setup, batch: int) -> list[dict[str, Any]]:
    """Every distinct convolution of the UNet at this batch size, and how many layers are like it."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    unet = setup.state.generator.unet

    def hook(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        key = (tuple(x.shape), tuple(layer.weight.shape), layer.stride, layer.padding)
        entry = found.setdefault(key, {"layer": layer, "x": x.detach().clone(), "y": output.detach(), "layers": 0})
        entry["layers"] += 1

    hooks = [layer.register_forward_hook(hook) for layer in unet.modules() if isinstance(layer, nn.Conv2d)]
    try:
        with torch.no_grad():
            x = torch.randn(batch, *setup.state.generator.sample_shape)
            labels, t = torch.zeros(batch, dtype=torch.long), torch.full((batch,), setup.recipe.timesteps.init)
            setup.state.generator.output(x, t, labels)
    finally:
        for one in hooks:
            one.remove()
    return list(found.values())


def layer_times(entry: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds and FLOP/s of one convolution in its three directions, with the strides it has in the network."""
    layer, x, y = entry["layer"], entry["x"], torch.randn_like(entry["y"])
    weight = layer.weight.detach()
    options = (list(layer.stride), list(layer.padding), list(layer.dilation), False, [0, 0], layer.groups)

    def backward(mask: list[bool]) -> Run:
        bias = [weight.shape[0]] if layer.bias is not None else None
        return lambda: torch.ops.aten.convolution_backward(y, x, weight, bias, *options, mask)

    with_bias = layer.bias is not None
    runs: dict[str, Run] = {
        "forward": lambda: torch.ops.aten.convolution(x, weight, layer.bias, *options),
        "input": backward([True, False, False]),
        "weight": backward([False, True, with_bias]),
    }
    flops = 2 * y.numel() * weight[0].numel()
    times = {}
    with torch.no_grad():
        for name, run in runs.items():
            seconds = median_s(run, rounds)
            times[name] = {"us": 1e6 * seconds, "flops_per_s": flops / seconds}
    out, inside, height, width = *weight.shape[:2], *weight.shape[2:]
    return {
        "shape": f"{inside}→{out}, {height}×{width}, stride {layer.stride[0]}, {x.shape[2]}×{x.shape[3]} pixels",
        "layers": entry["layers"],
        "flops": flops,
        "times": times,
    }


def measure(quick: bool) -> dict[str, Any]:
    keys = ["mask.samples=4" if quick else "mask.samples=256", *(["batch_size=2"] if quick else [])]
    recipe = load_recipe("digits_plain", keys)
    ours, plain = set_up(recipe), set_up(recipe)
    loop, rounds = PlainLoop(plain, recipe.update_rule), 1 if quick else 30
    times: dict[str, list[float]] = {"engine": [], "plain loop": []}
    for index in range(rounds + (1 if quick else 5)):
        for name, run in (("engine", ours.iterate), ("plain loop", loop)):
            start = time.perf_counter()
            run()
            if index >= (1 if quick else 5):
                times[name].append(time.perf_counter() - start)
    account = counted(ours.engine, ours.state)
    machine = peaks(quick)
    layers = [layer_times(entry, 2 if quick else 30) for entry in convolutions(ours, 2 * recipe.batch_size)]
    moved = sum(account["parts"][name]["bytes"] for name in account["formulas"])
    seconds = sum(PASSES[way] * layer["layers"] * layer["times"][way]["us"] / 1e6 for layer in layers for way in PASSES)
    in_layers = sum(PASSES.values()) * sum(layer["layers"] * layer["flops"] for layer in layers)
    return {
        "machine": environment(),
        "command": "python bench/floor.py" + " --quick" * quick,
        "batch": recipe.batch_size,
        "peaks": machine,
        "iteration": {
            "flops": account["counted_flops"],
            "flops_in_convolutions": in_layers,
            "formula_bytes": moved,
            "products_ms": 1e3 * account["counted_flops"] / machine["sgemm_flops_per_s"],
            "memory_ms": 1e3 * moved / machine["copy_bytes_per_s"],
            "layers_ms": 1e3 * seconds,
            "measured_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        },
        "convolutions": sorted(layers, key=lambda layer: -layer["layers"] * layer["flops"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick and options.output == RESULTS:
        parser.error("--quick times nothing worth keeping: give --output")
    found = measure(options.quick)
    options.output.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    print(json.dumps({"peaks": found["peaks"], **found["iteration"]}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
