"""Every kernel once, at the block size it is launched with, against plain torch on the same device."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pecker_kernels as pk
import torch
from pecker_kernels import reference
from pecker_kernels.mask import bits as masks
from pecker_kernels.scores import torch_ops
from pecker_kernels.scores.backend import backend
from rows import put
from shapes import TINY
from timing import CUDA, DEVICE, random_mask
from torch import Tensor

IMPL = "triton" if CUDA else "cpu"
SHAPES = ((333, 77), (1025,), (64, 16, 3, 3))


def equal(a: Tensor, b: Tensor, what: str = "") -> None:
    assert torch.equal(a.cpu(), b.cpu()), what


def near(a: Tensor, b: Tensor, rtol: float = 1e-6, atol: float = 0.0) -> None:
    torch.testing.assert_close(a.float().cpu(), b.float().cpu(), rtol=rtol, atol=atol)


class Smoke:
    """Checks by name; one that fails is written down and the next one runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failed = folder, 0
        self.draw = torch.Generator(DEVICE).manual_seed(0)

    def check(self, name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        try:
            run()
            if CUDA:
                torch.cuda.synchronize()
            put(self.folder, smoke=name, ok=True, s=round(time.perf_counter() - start, 2))
        except Exception as error:  # also what a launch raises
            self.failed += 1
            put(self.folder, smoke=name, ok=False, error=f"{type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc()


def smoke(folder: Path) -> int:
    found = Smoke(folder)
    _bits(found)
    _selection(found)
    _adam(found)
    _norms(found)
    if CUDA:
        _tiles(found)
    found.check("the rate keeps its place", _rate)
    return 1 if found.failed else 0


def _bits(s: Smoke) -> None:
    n = 4099 if TINY else 3_000_017
    keep = torch.rand(n, device=DEVICE, generator=s.draw) < 0.3
    bits, x = reference.pack_bits(keep), torch.randn(n, device=DEVICE, generator=s.draw)
    s.check("pack", lambda: equal(masks.pack_bits(keep, IMPL), bits))
    s.check("unpack", lambda: equal(masks.unpack_bits(bits, n, IMPL), keep))

    def count() -> None:
        assert masks.popcount(bits, IMPL) == int(keep.sum())

    s.check("popcount", count)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):

        def apply(dtype: torch.dtype = dtype) -> None:
            equal(masks.apply_(x.to(dtype), bits, IMPL), reference.apply_(x.to(dtype), bits))

        s.check(f"apply {dtype}", apply)


def _selection(s: Smoke) -> None:
    n = 4099 if TINY else 3_000_017
    x = [torch.randn(shape, device=DEVICE, generator=s.draw).abs() for shape in ((n,), (333, 77), (5,))]
    ours = backend(IMPL)

    def histograms() -> None:
        a, b = ours.census(x, False), torch_ops.census(x, False)
        equal(a.counts, b.counts)
        equal(a.faults, b.faults)
        first = int(b.counts.argmax())
        c, pool = ours.second_histogram(x, False, first, int(b.counts[first]))
        d, _ = torch_ops.second_histogram(x, False, first, int(b.counts[first]))
        equal(c, d)
        both = (first << 10) | int(d.argmax())
        equal(ours.third_histogram(x, False, both, pool), torch_ops.third_histogram(x, False, both, None))

    def threshold() -> None:
        for k in (1, 17, 1000, sum(t.numel() for t in x)):
            assert pk.kth_largest(x, k, impl=IMPL) == reference.kth_largest(x, k), k
        assert pk.kth_largest([torch.zeros(n, device=DEVICE)], 5, impl=IMPL) == 0.0

    def keep() -> None:
        for cut, rooms in ((0.5, [-1] * 3), (float(x[0][7]), [1, 0, 0])):
            a, b = ours.keep_bits(x, False, cut, rooms), torch_ops.keep_bits(x, False, cut, rooms)
            for mine, theirs in zip(a[0], b[0]):
                equal(mine, theirs)
            equal(a[1], b[1])

    def contrast() -> None:
        a, b = [t.clone() for t in x], [t.clone() for t in x]
        ours.contrast_(a, x, 3, 0.01, True)
        torch_ops.contrast_(b, x, 3, 0.01, True)
        for mine, theirs in zip(a, b):
            near(mine, theirs)
        near(ours.rms_sums(x, 3), torch_ops.rms_sums(x, 3))

    def blocks() -> None:
        for height, width in ((1, 77), (128, 128), (333, 77)):
            near(ours.block_sums(x[1], height, width, True), torch_ops.block_sums(x[1], height, width, True))
            kept = torch.arange(-(-333 // height) * -(-77 // width), device=DEVICE) % 2 == 0
            equal(ours.block_bits(kept, (333, 77), height, width), torch_ops.block_bits(kept, (333, 77), height, width))

    for name, run in (
        ("histograms", histograms),
        ("threshold", threshold),
        ("keep bits", keep),
        ("contrast", contrast),
        ("blocks", blocks),
    ):
        s.check(name, run)
    for reduction in ("sum", "abs", "square"):
        for dtype in (torch.float32, torch.bfloat16):

            def accumulate(reduction: str = reduction, dtype: torch.dtype = dtype) -> None:
                a, b, grads = [t.clone() for t in x], [t.clone() for t in x], [(t - 0.4).to(dtype) for t in x]
                census = ours.accumulate_(a, grads, reduction, True)
                torch_ops.accumulate_(b, grads, reduction, False)
                for mine, theirs in zip(a, b):
                    near(mine, theirs)
                assert census is not None
                equal(census.counts, torch_ops.census(a, reduction == "sum").counts)

            s.check(f"accumulate {reduction} {dtype}", accumulate)


def _step(
    density: float | None,
    rule: str = "masked",
    dtype: torch.dtype = torch.float32,
    lists: bool | None = None,
    **keys: object,
) -> None:
    """Three steps by ours and by the reference from the same start; what the mask leaves out keeps its bits."""
    lanes = nullcontext()
    if lists is not None and CUDA:
        from pecker_kernels.gpu import adam_lanes

        lanes = mock.patch.object(adam_lanes, "INDEX_BELOW", 2.0 if lists else 0.0)
    ends = []
    with lanes:
        for impl in (IMPL, "reference"):
            draw = torch.Generator(DEVICE).manual_seed(1)
            named = [
                (f"p{i}", torch.nn.Parameter(torch.randn(shape, device=DEVICE, generator=draw).to(dtype)))
                for i, shape in enumerate(SHAPES)
            ]
            mask = None if density is None else random_mask(named, density, "element")
            optimizer = pk.MaskedAdam(named, mask, 1e-3, impl=impl, **keys)  # type: ignore[arg-type]
            before = [p.detach().clone() for _, p in named]
            for _ in range(3):
                for _, p in named:
                    p.grad = torch.randn(p.shape, device=DEVICE, generator=draw).to(dtype)
                more = [torch.randn(p.shape, device=DEVICE, generator=draw) for _, p in named]
                optimizer.step(more if rule == "differentiated" else None)
            ends.append([p.detach() for _, p in named])
            for (name, p), start in zip(named, before):
                if mask is not None and rule == "masked":
                    equal(p.detach()[~mask.bool(name)], start[~mask.bool(name)], "outside the mask")
    for mine, theirs in zip(*ends):
        near(mine, theirs, 2e-5 if dtype == torch.float32 else 1e-2, 1e-6)


def _adam(s: Smoke) -> None:
    half = torch.bfloat16
    s.check("adam dense", lambda: _step(None))
    s.check("adam dense, no first moment", lambda: _step(None, betas=(0.0, 0.999)))
    s.check("adam bitmap", lambda: _step(0.3, lists=False))
    s.check("adam lists", lambda: _step(0.3, lists=True))
    s.check("adam differentiated", lambda: _step(0.3, "differentiated"))
    clipped = {"clip_value": 0.5, "clip_norm": 1.0, "ema": 0.9, "weight_decay": 0.01, "decoupled_weight_decay": True}
    s.check("adam clipped, decayed, averaged", lambda: _step(0.3, **clipped))
    s.check("adam finite check", lambda: _step(0.3, check_finite=True))
    s.check("adam bf16, master copy", lambda: _step(0.3, dtype=half, master="fp32"))
    s.check("adam bf16, stochastic rounding", lambda: _step(0.3, dtype=half))


def _norms(s: Smoke) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for last in (False, True):

            def norm(dtype: torch.dtype = dtype, last: bool = last) -> None:
                x, grad = (torch.randn(2, 64, 9, 13, device=DEVICE, generator=s.draw).to(dtype) for _ in range(2))
                if last:
                    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
                weight, bias = (torch.randn(64, device=DEVICE, generator=s.draw).to(dtype) for _ in range(2))
                found = []
                for impl in (IMPL if dtype == torch.float32 or CUDA else "reference", "reference"):
                    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
                    y = pk.group_norm_silu(*leaves, 8, impl=impl)
                    found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
                for mine, theirs in zip(*found):
                    scale = float(theirs.float().abs().max())
                    near(
                        mine,
                        theirs,
                        1e-2 if dtype == torch.bfloat16 else 1e-4,
                        (1e-2 if dtype == torch.bfloat16 else 1e-5) * scale,
                    )

            s.check(f"norm {dtype} {'last' if last else 'first'}", norm)


def _tiles(s: Smoke) -> None:
    from pecker_kernels.wgrad.tiles import plan_tiles

    op = torch.ops.pecker.tile_weight_grad
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns, tile in ((512, 384, (128, 128)), (77, 53, (32, 16))):

            def product(
                dtype: torch.dtype = dtype, rows: int = rows, columns: int = columns, tile: tuple[int, int] = tile
            ) -> None:
                live = torch.rand(-(-rows // tile[0]), -(-columns // tile[1])) < 0.5
                live[-1, -1] = True
                tiles = plan_tiles(live, (rows, columns), tile, 1, torch.device(DEVICE))
                g, x = (torch.randn(1000, m, device=DEVICE).to(dtype) for m in (rows, columns))
                kept = live.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns].to(DEVICE)
                mine, truth = op(g, x, tiles.table, tiles.count, *tile), (g.double().t() @ x.double())[kept]
                error = float((mine.double() - truth).norm() / truth.norm())
                assert error < (1e-5 if dtype == torch.float32 else 1e-2), error

            s.check(f"tiles {dtype} {rows}x{columns}", product)


def _rate() -> None:
    """A captured graph reads the learning rate where it was."""
    from types import SimpleNamespace

    from pecker_fast.engine import TrainState

    optimizer = pk.MaskedAdam([torch.nn.Parameter(torch.zeros(1, device=DEVICE))])
    state = object.__new__(TrainState)
    state.step, state.score_optimizer, state.updates = 0, optimizer, SimpleNamespace(optimizers={})  # type: ignore[assignment]
    rates = SimpleNamespace(warmup=0, score=1e-3, generator=1e-3)
    state.set_learning_rates(rates, torch.device(DEVICE))  # type: ignore[arg-type]
    held = optimizer.param_groups[0]["lr"]
    state.set_learning_rates(rates, torch.device(DEVICE))  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["lr"] is held
