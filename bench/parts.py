"""What each operation of pecker_kernels takes inside a training run: on the digits network, and at the size of SD 1.5's UNet.

    python bench/parts.py --label "C++ kernels"        # adds its column to bench/results/parts.json

The same calls that pecker_fast makes, so an older version of pecker_kernels can be timed by putting it first on PYTHONPATH.
SD 1.5's size needs 20 GB; --networks digits leaves it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pecker_kernels as pk
import torch
from safetensors import safe_open
from shapes import Shapes, sd15, size

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "parts.json"
ADAM = {"lr": 1e-5, "betas": (0.0, 0.999), "clip_value": 1.0}


def digits() -> Shapes:
    """The shipped generator's tensors."""
    file = next((ROOT / "pecker_fast" / "assets" / "digits" / "generator").rglob("*.safetensors"))
    with safe_open(file, "pt") as tensors:
        return tuple((name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


NETWORKS = {"digits": (digits, 30), "sd15": (sd15, 3)}


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """After one call that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(shapes: Shapes, rounds: int) -> dict[str, float]:
    """Milliseconds by part."""
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes}
    for p in params.values():
        p.grad = torch.randn(p.shape) * 1e-3
    grads = [p.grad for p in params.values()]
    found: dict[str, float] = {}
    scores = pk.SaliencyScores(params.items())
    found["saliency: accumulate"] = median_ms(scores.accumulate, rounds)
    found["mask: the most salient half"] = median_ms(
        lambda: pk.SaliencyMask.from_scores(scores, density=0.5), min(rounds, 5)
    )
    half = pk.SaliencyMask.from_scores(scores, density=0.5)
    masks = {density: pk.SaliencyMask.from_scores(scores, density=density) for density in (0.1, 0.01)}
    rows = pk.SaliencyMask.from_scores(scores, density=0.1, structure="row")
    found["finite check of all gradients"] = median_ms(lambda: bool(pk.all_finite(grads)), rounds)

    def step(mask: pk.SaliencyMask | None, **kwargs: object) -> float:
        optimizer = pk.MaskedAdam(params.items(), mask, **ADAM)
        return median_ms(lambda: optimizer.step(**kwargs), rounds)

    found["ψ: dense step"] = step(None)
    forget = {name: torch.randn(p.shape) * 1e-3 for name, p in params.items()}
    found["θ, differentiated, density .5"] = step(half, masked_grads=forget)
    del forget, half
    for density, mask in masks.items():
        found[f"θ, salient_only, elements, density {density:g}"] = step(mask)
    found["θ, salient_only, rows, density 0.1"] = step(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="name of the column")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    table = json.loads(options.output.read_text()) if options.output.is_file() else {"networks": {}}
    table["machine"] = {"threads": torch.get_num_threads(), "torch": torch.__version__.partition("+")[0]}
    for name in options.networks:
        make, rounds = NETWORKS[name]
        shapes = make()
        found = measure(shapes, rounds)
        column = table["networks"].setdefault(name, {"weights": size(shapes), "parts_ms": {}})["parts_ms"]
        column[options.label] = {part: float(f"{ms:.3g}") for part, ms in found.items()}
        print(name, json.dumps(column[options.label], ensure_ascii=False, indent=1))
    options.output.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
