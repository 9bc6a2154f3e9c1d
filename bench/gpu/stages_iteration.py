"""Whole iterations of Stable Diffusion at full size, with random weights. FLOPs and memory are carried, not counted here."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import full_size
import pecker_kernels as pk
import torch
from shapes import TINY
from timing import CUDA, DEVICE, Bench, random_mask

from pecker_fast.networks.architectures import PREDICTION_TYPES, architecture
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.loop import iteration as one_iteration

COUNTED = Path(__file__).resolve().parents[1] / "results" / "full_size_meta.json"
SMALL = {"sample_size": 8, "block_out_channels": [32, 32, 32, 32], "cross_attention_dim": 16, "attention_head_dim": 4}
ROWS = ["update_rule=salient_only", "mask.density=0.1", "mask.structure=row"]
BEST_BF16 = 989e12  # FLOP/s of an H100 or H200 without sparsity
WARM = 6


def iteration(folder: Path, arch: str, batch: str, rule: str, how: str) -> None:
    """rule: "dense" (sfd) or "rows" (a tenth of the rows). how: "graph" or "eager"."""
    bench, label = Bench(folder), f"iteration {arch} b{batch} {rule} {how}"
    pk.SaliencyMask.random = classmethod(  # type: ignore[method-assign]
        lambda cls, named, *, density, seed=0, structure="element", tile=(128, 128), **_: random_mask(
            list(named), density, structure, tile
        )
    )
    graph = ["engine.cuda_graph=true"] if how == "graph" and CUDA else []
    recipe = load_recipe(
        None, [*full_size.KEYS, f"batch_size={batch}", *(["method=sfd"] if rule == "dense" else ROWS), *graph]
    )
    config = dict(architecture(f"{arch}_unet")) | (SMALL if TINY else {})
    start = time.perf_counter()
    engine, state = full_size.set_up(config, PREDICTION_TYPES[arch], recipe, torch.device(DEVICE))
    _wait()
    bench.put(what=f"{label}: set up", s=round(time.perf_counter() - start, 1))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(4 if TINY else 16):
        _wait()
        start = time.perf_counter()
        losses = one_iteration(engine, state)
        host = time.perf_counter() - start
        _wait()
        times.append(time.perf_counter() - start)
        engine.look(state)
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None
        values = {name: float(loss) for name, loss in losses.items()} if i in (0, 15) else None
        bench.put(
            what=label, i=i, ms=round(1e3 * times[-1], 2), host_ms=round(1e3 * host, 2), peak_gib=peak, losses=values
        )
    counted = json.loads(COUNTED.read_text())
    flops = full_size.iteration_flops(counted["networks"][arch], int(batch))
    best = statistics.median(times[WARM:] or times)
    predicted = next(
        (
            row["peak_bytes"]
            for row in counted["memory"]
            if (row["arch"], row["batch"]) == (arch, int(batch)) and not row["checkpointing"]
        ),
        None,
    )
    bench.put(
        what=f"{label}: median", ms=round(1e3 * best, 2), tflop=round(flops / 1e12, 2), tflops=round(flops / best / 1e12, 1),
        mfu=round(flops / best / BEST_BF16, 4), images_s=round(4 * int(batch) / best, 2), peak_gib=peak,
        predicted_gib=round(predicted / 2**30, 2) if predicted else None,
    )  # fmt: skip
    if how == "eager":
        bench.put(what=f"{label}: kernels", kernels=bench.kernels_us(lambda: one_iteration(engine, state)))


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()
