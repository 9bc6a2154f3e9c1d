"""The kernels alone: what the machine can do, optimizer steps, selection, weight gradients of tiles, norms."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pecker_kernels as pk
import torch
from pecker_kernels import native
from shapes import SD15_WEIGHTS, TINY
from timing import CUDA, DEVICE, Bench, free, parameters, random_mask
from torch import Tensor
from torch.nn import functional as F

PACKAGES = ("torch", "triton", "diffusers", "pydantic", "transformers", "numpy", "pytest", "pytest-xdist")
SDXL_WEIGHTS = 2_567_463_684
SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.draw"


def env(folder: Path) -> None:
    """Versions, and the ceilings that everything else is read against."""
    bench, versions = Bench(folder), {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    bench.put(
        versions=versions, python=platform.python_version(), native=native.available(),
        cores=len(os.sched_getaffinity(0)), device=torch.cuda.get_device_name() if CUDA else "cpu",
    )  # fmt: skip
    if CUDA:
        query = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
        bench.put(gpu=subprocess.run(query, capture_output=True, text=True).stdout.strip())
    n = 1 << (16 if TINY else 30)
    a, b = torch.rand(n, device=DEVICE), torch.empty(n, device=DEVICE)
    bench.measure("copy", lambda: b.copy_(a), 8 * n)
    bench.measure("update in place", lambda: b.mul_(1.0), 8 * n)
    bench.measure("read", lambda: a.sum(), 4 * n)
    side = 64 if TINY else 8192
    x, y = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ms = bench.measure("bf16 matmul 8192", lambda: x @ y)
    if ms:
        bench.put(what="bf16 matmul rate", tflops=round(2 * side**3 / ms / 1e9, 1))


def step(folder: Path) -> None:
    """Optimizer steps on SD 1.5's 686 tensors, host-inclusive and the device alone, beside torch's fused Adam."""
    bench, (named, weights) = Bench(folder), parameters()
    for betas in ((0.9, 0.999), (0.0, 0.999)):
        _peer(bench, named, betas, weights)
        _dense(bench, named, betas, weights)
    for structure, density in (
        ("row", 0.1),
        ("element", 0.1),
        ("element", 0.5),
        ("element", 0.01),
        ("tile", 0.1),
        ("row", 0.01),
    ):
        start = time.perf_counter()
        mask = random_mask(named, density, structure)
        bench.put(what=f"mask {structure} {density}", s=round(time.perf_counter() - start, 3), density=mask.density)
        label = f"{structure} {density}"
        _masked(bench, named, mask, f"masked {label}, as shipped")
        if structure == "element" and CUDA:
            with _lists_below(2.0):
                _masked(bench, named, mask, f"masked {label}, lists")
        if (structure, density) == ("row", 0.1):
            _compact(bench, named, mask)
        if (structure, density) == ("element", 0.1):
            _multiplied(bench, named, mask)
            _differentiated(bench, named, mask)
    _moved(bench, named, weights)
    _average(bench, named, weights)


# Each in a function of its own: what it holds goes before the next one.


def _peer(bench: Bench, named: Any, betas: tuple[float, float], weights: int) -> None:
    peer = torch.optim.Adam([p for _, p in named], 1e-5, betas=betas, fused=True, capturable=CUDA)
    bench.measure(f"torch fused {betas}", peer.step, 28 * weights)


def _dense(bench: Bench, named: Any, betas: tuple[float, float], weights: int) -> None:
    free()
    ours = pk.MaskedAdam(named, None, 1e-5, betas)
    bench.measure(f"dense {betas}", ours.step, (28 if betas[0] else 20) * weights, profile=True)


def _masked(bench: Bench, named: Any, mask: Any, label: str) -> None:
    free()
    start = time.perf_counter()
    ours = pk.MaskedAdam(named, mask, 1e-5, (0.9, 0.999))
    ours.step()
    bench.measure(label, ours.step, first_step_s=round(time.perf_counter() - start, 2), profile=True)


def _compact(bench: Bench, named: Any, mask: Any) -> None:
    free()
    ours, given, held = pk.MaskedAdam(named, mask, 1e-5, (0.9, 0.999)), [], [p.grad for _, p in named]
    for name, p in named:
        count = mask.count_of(name)
        given.append(p.grad[mask.bool(name)] if 0 < count < p.numel() else p.grad if count else None)
        p.grad = None
    bench.measure("masked row 0.1, compact gradients", lambda: ours.step(compact_grads=given))
    for (_, p), grad in zip(named, held):
        p.grad = grad


def _multiplied(bench: Bench, named: Any, mask: Any) -> None:
    """What other unlearning code does."""
    free()
    floats, grads = [mask.bool(name).float() for name, _ in named], [p.grad for _, p in named]
    peer = torch.optim.Adam([p for _, p in named], 1e-5, fused=True, capturable=CUDA)
    bench.measure("mask-multiply + fused", lambda: (torch._foreach_mul_(grads, floats), peer.step()))


def _differentiated(bench: Bench, named: Any, mask: Any) -> None:
    free()
    ours, more = pk.MaskedAdam(named, mask, 1e-5, (0.0, 0.999)), [torch.randn_like(p) for _, p in named]
    bench.measure("differentiated element 0.1", lambda: ours.step(more))


@contextmanager
def _lists_below(density: float) -> Iterator[None]:
    """Lanes are listed below this density."""
    from pecker_kernels.gpu import adam_lanes

    before, adam_lanes.INDEX_BELOW = adam_lanes.INDEX_BELOW, density
    try:
        yield
    finally:
        adam_lanes.INDEX_BELOW = before


def _average(bench: Bench, named: Any, weights: int) -> None:
    free()
    averages, now = [p.detach().clone() for _, p in named], [p.detach() for _, p in named]
    weight = torch.full((), 0.01, device=DEVICE)
    bench.measure("average", lambda: torch._foreach_lerp_(averages, now, [weight] * len(now)), 12 * weights)
    bench.measure("average, number of the host", lambda: torch._foreach_lerp_(averages, now, 0.01), 12 * weights)


def _moved(bench: Bench, named: Any, weights: int) -> None:
    """What a loop that frees its gradients pays on the host."""
    ours = pk.MaskedAdam(named, None, 1e-5, (0.0, 0.999))
    sets, turn = [[p.grad for _, p in named], [p.grad.clone() for _, p in named]], [0]

    def moved() -> None:
        turn[0] ^= 1
        for (_, p), grad in zip(named, sets[turn[0]]):
            p.grad = grad
        ours.step()

    bench.measure("dense, gradients moved", moved, 20 * weights, graph=False)


def select(folder: Path) -> None:
    """Exact thresholds beside topk and sort, accumulation, masks."""
    bench = Bench(folder)
    for n in (4099,) if TINY else (1 << 25, SD15_WEIGHTS, SDXL_WEIGHTS):
        for kind in ("half-normal", "equal") if n < 1e9 else ("half-normal",):
            x = torch.zeros(n, device=DEVICE) if kind == "equal" else torch.randn(n, device=DEVICE).abs_()
            for density in (0.1, 0.5) if n < 1e9 else (0.1,):
                _thresholds(bench, x, kind, density)
            del x
            free()
    named, weights = parameters()
    for reduction in ("sum", "abs", "square"):
        scores = pk.SaliencyScores(named, reduction)
        scores.accumulate()
        squares = reduction == "square"
        bench.measure(f"accumulate {reduction}", scores.accumulate, 12 * weights, graph=False, profile=squares)
    bench.measure(
        "accumulate, with census", lambda: scores.accumulate(last=True), 12 * weights, graph=False, profile=True
    )
    for structure in ("element", "row", "tile"):
        bench.measure(
            f"mask from scores, {structure} 0.1",
            lambda: pk.SaliencyMask.from_scores(scores, density=0.1, structure=structure),  # noqa: B023
            graph=False, rounds=3, profile=structure == "element",
        )  # fmt: skip


def _thresholds(bench: Bench, x: Tensor, kind: str, density: float) -> None:
    n, k = x.numel(), round(x.numel() * density)
    label = f"{kind} {n} {density}"
    bench.measure(f"threshold {label}", lambda: pk.kth_largest([x], k), 4 * n, graph=False, profile=True, rounds=5)
    if n < 1 << 31:
        bench.measure(f"topk {label}", lambda: x.topk(k, sorted=False).values.min().item(), graph=False, rounds=3)
        if density == 0.1 and kind == "half-normal":
            bench.measure(f"sort {label}", lambda: x.sort(descending=True).values[k - 1].item(), graph=False, rounds=2)


def products(folder: Path) -> None:
    """Weight gradients of live tiles against a whole product."""
    from pecker_kernels.wgrad.tiles import plan_tiles

    bench, op = Bench(folder), torch.ops.pecker.tile_weight_grad
    sizes = ((64, 256, 256),) if TINY else ((8192, 1280, 1280), (65536, 320, 320), (16384, 5120, 640))
    dtype = torch.bfloat16 if CUDA else torch.float32
    for k, rows, columns in sizes:
        g, x = (torch.randn(k, m, device=DEVICE, dtype=dtype) for m in (rows, columns))
        whole = bench.measure(f"whole gradient {k} {rows}x{columns}", lambda: g.t() @ x)  # noqa: B023
        for density in (1.0, 0.25, 0.1):
            live = torch.rand(-(-rows // 128), -(-columns // 128)) <= density
            live[0, 0] = True
            tiles = plan_tiles(live, (rows, columns), (128, 128), 1, torch.device(DEVICE))
            ms = bench.measure(
                f"tiles {k} {rows}x{columns} {density}", lambda: op(g, x, tiles.table, tiles.count, 128, 128),  # noqa: B023
                live=float(live.float().mean()), graph=CUDA,
            )  # fmt: skip
            if ms:
                rate = round(2 * k * tiles.count / ms / 1e9, 1)
                bench.put(what="tiles rate", tflops=rate, ratio=round(whole / ms, 2) if whole else None)


def norm(folder: Path) -> None:
    """GroupNorm and SiLU as one, at SD 1.5's sizes with batch 8, in both memory orders, beside torch's two."""
    bench = Bench(folder)
    sizes = ((2, 8, 4),) if TINY else ((8, 320, 64), (8, 640, 32), (8, 1280, 16))
    for size in sizes:
        for last in (False, True):
            _norm(bench, size, last)


def _norm(bench: Bench, size: tuple[int, int, int], last: bool) -> None:
    n, channels, side = size
    order = torch.channels_last if last else torch.contiguous_format
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, grad = (
        torch.randn(n, channels, side, side, device=DEVICE, dtype=dtype).to(memory_format=order) for _ in range(2)
    )
    w, b = (torch.randn(channels, device=DEVICE, dtype=dtype) for _ in range(2))
    leaves, groups = [t.detach().requires_grad_() for t in (x, w, b)], min(32, channels // 2)
    label, moved = f"{n}x{channels}x{side}x{side} {'last' if last else 'first'}", x.numel() * x.element_size()

    def two(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, w, b))

    def one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return pk.group_norm_silu(x, w, b, groups)

    bench.measure(f"norm forward {label}, torch", lambda: two(x, w, b), 3 * moved)
    bench.measure(f"norm forward {label}, fused", lambda: one(x, w, b), 3 * moved, profile=True)
    bench.measure(
        f"norm both ways {label}, torch",
        lambda: torch.autograd.grad(two(*leaves), leaves, grad),
        8 * moved,
        graph=False,
    )
    bench.measure(
        f"norm both ways {label}, fused",
        lambda: torch.autograd.grad(one(*leaves), leaves, grad),
        8 * moved,
        graph=False,
    )
