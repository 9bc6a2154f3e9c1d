"""The grouped product over live tiles: values, lanes, splits of k and what is refused."""

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import check_sums
from pecker_kernels import PeckerKernelsError, reference
from pecker_kernels.gpu import wgrad
from pecker_kernels.torch_library import wgrad as ops_wgrad
from pecker_kernels.wgrad.tiles import plan_tiles
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# k, rows, columns, tile: multiples of 16, ragged everywhere, one tile larger than the weight
CASES = [
    (70, 64, 96, (32, 32)),
    (130, 77, 53, (32, 16)),
    (33, 40, 70, (24, 20)),
    (16, 30, 20, (128, 128)),
    (1, 16, 16, (16, 16)),
]


def operands(device, k, rows, columns, tile, dtype, density=0.5):
    generator = torch.Generator().manual_seed(k + rows)
    g, x = (torch.randn(k, n, generator=generator).to(dtype).to(device) for n in (rows, columns))
    live = torch.rand(-(-rows // tile[0]), -(-columns // tile[1]), generator=generator) < density
    live[-1, -1] = True
    return g, x, live, plan_tiles(live, (rows, columns), tile, 1, torch.device(device))


def keep_of(live, rows, columns, tile):
    return live.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]


def check(found, g, x, keep):
    keep, g, x = keep.to(x.device), g.detach(), x.detach()
    truth = reference.live_weight_grad(g.double(), x.double(), keep)
    scale = reference.live_weight_grad(g.double().abs(), x.double().abs(), keep)
    check_sums(found, reference.live_weight_grad(g, x, keep), truth, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_live_tiles_are_those_of_the_dense_product(device, poison, case, dtype, splits):
    g, x, live, tiles = operands(device, *case, dtype)
    found = wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile, splits=splits)
    check(found, g, x, keep_of(live, *case[1:]))
    again = wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile, splits=splits)
    assert torch.equal(found, again)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_one_tile_and_all_tiles(device, poison, density):
    case = (40, 48, 64, (16, 32))
    g, x, live, tiles = operands(device, *case, torch.float32, density)
    check(wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile), g, x, keep_of(live, *case[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["odd address", "odd stride", "columns first"])
def test_any_layout(device, poison, dtype, layout):
    case = (40, 48, 64, (16, 32))
    g, x, live, tiles = operands(device, *case, dtype)
    if layout == "odd address":
        g, x = (torch.cat([t.new_zeros(3), t.view(-1)])[3:].view(t.shape) for t in (g, x))
    elif layout == "odd stride":
        g, x = (torch.cat([t, t.new_full((t.shape[0], 5), float("nan"))], 1)[:, : t.shape[1]] for t in (g, x))
    else:
        g, x = (t.t().contiguous().t() for t in (g, x))
    found = wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile, splits=2)
    check(found, g, x, keep_of(live, *case[1:]))


def test_values_of_dead_tiles_and_positions_beyond_are_not_read(device):
    case = (40, 48, 64, (16, 32))
    g, x, live, tiles = operands(device, *case, torch.float32)
    keep = keep_of(live, *case[1:])
    clean = wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile)
    g[:, ~keep.any(1).to(device)] = float("nan")
    padded = [torch.cat([t, torch.full_like(t, float("nan"))])[:40] for t in (g, x)]
    assert torch.equal(wgrad.tile_weight_grad(*padded, tiles.table, tiles.count, *tiles.tile), clean)


@pytest.mark.parametrize("mistake", ["lanes swapped", "columns too far", "rows too far", "a position less"])
def test_the_gate_sees_a_wrong_table(device, mistake):
    case = (70, 64, 96, (32, 32))
    g, x, live, tiles = operands(device, *case, torch.float32)
    table, k = tiles.table.clone(), 70
    if mistake == "lanes swapped":
        table[:, 2] = table[:, 2].flip(0)
    elif mistake == "a position less":
        k = 69
    else:
        table[0, 1 if "column" in mistake else 0] += 16  # the unit that kernels see
    found = wgrad.tile_weight_grad(g[:k], x[:k], table, tiles.count, *tiles.tile)
    with pytest.raises(AssertionError, match="too far"):
        check(found, g, x, keep_of(live, *case[1:]))


def test_sums_are_split_where_tiles_are_few():
    assert wgrad.splits_of(programs=1000, k=10**6, processors=132) == 1
    assert wgrad.splits_of(programs=10, k=10**6, processors=132) == wgrad.SPLITS
    assert wgrad.splits_of(programs=10, k=1023, processors=132) == 1
    assert wgrad.splits_of(programs=0, k=0, processors=1) == 1


@pytest.mark.parametrize("tile", [(16, 16), (24, 100), (128, 128), (512, 4096)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_blocks_fit_into_the_tile(tile, dtype, aligned):
    for how in ("ieee", "tf32"):
        block = wgrad.blocks(dtype, tile, how, aligned)
        assert 16 <= block.m <= tile[0]
        assert 16 <= block.n <= tile[1]


def test_flops_are_counted(device):
    case = (70, 77, 96, (32, 32))
    g, x, live, tiles = operands(device, *case, torch.float32)
    with FlopCounterMode(display=False) as counter:
        ops_wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, *tiles.tile, "triton")
    with FlopCounterMode(display=False) as peer:
        reference.strip_weight_grad(g, x, [(strip.rows, strip.inputs) for strip in tiles.strips])
    lanes = int(keep_of(live, *case[1:]).sum())
    assert counter.get_total_flops() == peer.get_total_flops() == wgrad.flops(70, lanes) == 2 * 70 * lanes
    assert wgrad.bytes_moved(70, 1, 32, 32, 1024, 4) == 4 * (70 * 64 + 1024)


def test_refusals(device):
    g, x, _, tiles = operands(device, 16, 32, 32, (16, 16), torch.float32)
    with pytest.raises(PeckerKernelsError, match="from 16x16 on, got 8x16"):
        wgrad.tile_weight_grad(g, x, tiles.table, tiles.count, 8, 16)
    with pytest.raises(PeckerKernelsError, match=r"got torch\.float64"):
        wgrad.tile_weight_grad(g.double(), x.double(), tiles.table, tiles.count, 16, 16)
    assert wgrad.tile_weight_grad(g[:0], x[:0], tiles.table, tiles.count, 16, 16).count_nonzero() == 0
    empty = tiles.table[:0]
    assert wgrad.tile_weight_grad(g, x, empty, 0, 16, 16).shape == (0,)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_layers_use_it(device, impl):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.SiLU(), nn.Linear(48, 33)).to(device)
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.4, structure="tile", tile=(16, 16), seed=1)
    x = torch.randn(2, 5, 40, device=device)
    dense = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with pk.skip_weight_gradients(model, mask, impl=impl) as skip:
        assert {row.impl for row in skip.report() if row.mode == "tiles"} == {"triton"}
        model(x).square().sum().backward()
        for (name, _), d, g in zip(model.named_parameters(), dense, skip.grads(), strict=True):
            if g is not None:
                torch.testing.assert_close(g, d[mask.bool(name)] if g.shape != d.shape else d, rtol=1e-4, atol=1e-4)
    small = pk.SaliencyMask.random(model.named_parameters(), 0.4, structure="tile", tile=(8, 16), seed=1)
    with pk.skip_weight_gradients(model, small) as skip:
        assert "tiles" not in {row.mode for row in skip.report()}
    with pytest.raises(PeckerKernelsError, match="from 16x16 on, got 8x16"):
        pk.skip_weight_gradients(model, small, impl="triton")
    with pytest.raises(PeckerKernelsError, match=r"got torch\.float64"):
        pk.skip_weight_gradients(model.double(), mask, impl="triton")
