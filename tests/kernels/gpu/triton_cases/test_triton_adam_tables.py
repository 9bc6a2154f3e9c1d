"""Around the Triton Adam step: lane tables, random rounding, far offsets, the norm, what is cached and what is refused."""

import weakref
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from adam_rig import SETTINGS, Rig, with_settings
from pecker_kernels import PeckerKernelsError, reference
from pecker_kernels.adam.jobs import AdamJob
from pecker_kernels.gpu import adam, adam_lanes, adam_math, adam_plan, gradstats
from pecker_kernels.gpu.adam import adam_kernel, compile_arguments

FAR = (1 << 33) + 5 * adam_lanes.BLOCK


def job_of(param, grad, bits=None, **changes):
    lanes = param if bits is None else param.new_zeros(reference.popcount(bits))
    moments = [torch.zeros_like(lanes, dtype=torch.float32) for _ in range(2)]
    step = torch.ones((), device=param.device)
    job = AdamJob(param, grad, None, bits, False, bits is not None, *moments, None, None, step, 0)
    return replace(job, **changes)


@pytest.mark.parametrize("tile", [256, 1 << 16])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.5, 1.0])
def test_lists_hold_the_positions_of_the_ones(device, tile, density):
    n = 3 * tile + 17
    keep = torch.rand(n, generator=torch.Generator().manual_seed(0)) < density
    table = adam_lanes.index_table(reference.pack_bits(keep).to(device), n, block=128, tile=tile)
    places = table.source.cpu().to(torch.int64) & 0xFFFF
    found, ranks = [], []
    for first, rank, count in table.chunks.tolist():
        assert 0 < count <= 128
        ranks.extend(range(rank, rank + count))
        found.append(first + places[rank : rank + count])
    assert ranks == list(range(int(keep.sum())))
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *found]), keep.nonzero().view(-1))


def test_density_in_live_chunks_decides(device):
    n = 64 * adam_lanes.BLOCK
    scattered = torch.zeros(n, dtype=torch.bool)
    scattered[::100] = True
    block = torch.zeros(n, dtype=torch.bool)
    block[: n // 100] = True
    kinds = [
        adam_lanes.masked_table(reference.pack_bits(k).to(device), n).kind for k in (scattered, block, block | True)
    ]
    assert kinds == [adam_lanes.INDEX.value, adam_lanes.BITMAP.value, adam_lanes.WHOLE.value]


@triton.jit
def rounding_kernel(value, index, step, seed: tl.int64, bits, out, near, N: tl.constexpr):
    at = tl.arange(0, N)
    wide = tl.full((), 0, tl.int64) + seed
    random = adam_math.random_bits16(tl.load(index + at) - at, at, adam_math.random_key(wide, tl.load(step)))
    tl.store(bits + at, random.to(tl.int32))
    tl.store(out + at, adam_math.round_bf16(tl.load(value + at), random))
    tl.store(near + at, adam_math.nearest_bf16(tl.load(value + at)))


@pytest.mark.parametrize("seed", [0, 7, (1 << 62) + 12345])
def test_random_rounding_is_the_references_bit_for_bit(device, seed):
    n = 4096
    generator = torch.Generator().manual_seed(1)
    value = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)
    value[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3895e38])
    value[1000:2000] = torch.arange(1000) * 2.0**-8 + 1  # ties
    index = torch.randint(0, 1 << 40, (n,), generator=generator)
    step = torch.tensor(12345.0, device=device)
    bits, out = torch.empty(n, dtype=torch.int32, device=device), torch.empty(n, dtype=torch.uint16, device=device)
    near = torch.empty_like(out)
    rounding_kernel[(1,)](value.to(device), index.to(device), step, seed, bits, out, near, n)
    expected = reference.random_bits16(index, seed, step.cpu())
    assert torch.equal(bits.cpu().long(), expected)
    for found, rounded in (
        (out, reference.stochastic_round_bf16(value, expected)),
        (near, value.to(torch.bfloat16)),
    ):
        found = found.cpu().view(torch.bfloat16)
        assert torch.equal(found.isnan(), rounded.isnan())
        number = ~found.isnan()
        assert torch.equal(found[number].view(torch.int16), rounded[number].view(torch.int16))


@pytest.mark.parametrize("state", ["whole", "compact", "dense", "differentiated"])
@pytest.mark.parametrize("offset", [0, 1])
def test_bfloat16_weights_are_rounded_as_in_the_reference(device, state, offset):
    """β₁ = β₂ = eps = 0 and powers of two: the update is ±lr exactly, so the rounding is all there is."""
    n, lr, seed, first_index = 300, 1e-3, (1 << 40) + 3, (1 << 35) - 100
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(n, generator=generator) < (1.0 if state == "whole" else 0.4)
    lanes = torch.ones_like(keep) if state == "differentiated" else keep
    start = torch.randn(n + offset, generator=generator).to(torch.bfloat16)[offset:]
    grad = 2.0 ** torch.randint(-4, 4, (n,), generator=generator)
    grad = torch.where(torch.rand(n, generator=generator) < 0.5, grad, -grad)
    settings = with_settings(lr=lr, beta1=0.0, beta2=0.0, eps=0.0, seed=seed, ema=0.25)
    param = torch.zeros(n + offset, dtype=torch.bfloat16, device=device)[offset:].copy_(start)
    width = int(keep.sum()) if state == "compact" else n
    moments = [torch.zeros(width, device=device) for _ in range(2)]
    bits = None if state == "whole" else reference.pack_bits(keep).to(device)
    more = torch.zeros(n, device=device) if state == "differentiated" else None
    step = torch.tensor(3.0, device=device)
    job = AdamJob(
        param, grad.to(device), more, bits, state == "differentiated", state == "compact", None, moments[0], None,
        moments[1], step, first_index,
    )  # fmt: skip
    adam.step([job], settings, {})
    random = reference.random_bits16(torch.arange(n) + first_index, seed, step.cpu())
    exact = start.float() - torch.tensor(lr) * grad.sign()
    expected = torch.where(lanes, reference.stochastic_round_bf16(exact, random), start)
    assert torch.equal(param.cpu().view(torch.int16), expected.view(torch.int16))
    assert not torch.equal(expected, torch.where(lanes, exact.to(torch.bfloat16), start)), "nothing was rounded up"
    ema = moments[1].cpu() if state == "compact" else moments[1].cpu()[lanes]
    torch.testing.assert_close(ema, 0.75 * expected[lanes].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["whole", "bitmap", "index"])
def test_far_offsets(device, kind, monkeypatch):
    """Addresses that are FAR elements too low, and a chunk that is FAR elements in: nothing of that size is allocated."""
    monkeypatch.setattr(adam_lanes, "INDEX_BELOW", 0.0)  # a bitmap at any density
    block, far_rank = adam_lanes.BLOCK, (1 << 32) + 3
    keep = torch.rand(block, generator=torch.Generator().manual_seed(0)) < 0.5
    near = Rig(device, [(block,)], density=None if kind == "whole" else 0.5, zero=False)
    (job,), _ = near.jobs()
    table = adam_lanes.whole_table(block, job.param.device)
    if kind != "whole":
        table = adam_lanes.index_table(job.bits, block) if kind == "index" else adam_lanes.masked_table(job.bits, block)
    source = table.source if table.source is not None else job.param
    state_far = FAR if kind == "whole" else far_rank
    source_far = {"whole": 0, "bitmap": FAR // 8, "index": 2 * far_rank}[kind]
    addresses = [
        job.param.data_ptr() - 4 * FAR,
        job.grad.data_ptr() - 4 * FAR,
        0,
        source.data_ptr() - source_far,
        job.exp_avg.data_ptr() - 4 * state_far,
        job.exp_avg_sq.data_ptr() - 4 * state_far,
        0,
        0,
        job.step.data_ptr(),
        0,
    ]
    rows = torch.tensor([addresses], device=device)
    first, rank, count = table.chunks[0].tolist()
    chunks = torch.tensor([[0, first + FAR, rank + far_rank, count]], device=device)
    scalars = torch.tensor([[1e-3, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], device=device)
    variant = adam_plan._variant(job, table)
    before, keep = job.param.clone(), near.ones[0].lanes.to(device)
    arguments = (0.1, 0.001, 0.999, 1e-8, 0.0, 0.0, 0.0)
    adam_kernel[(1,)](rows, chunks, scalars, *arguments, **compile_arguments(variant, SETTINGS))
    covered = int(table.chunks[0, 2]) if kind == "index" else int(keep.sum())
    moved = keep & (torch.cumsum(keep, 0) <= covered)
    expected = before - 1e-3 * (0.1 * job.grad) / ((0.001 * job.grad**2).sqrt() + 1e-8)
    torch.testing.assert_close(job.param[moved], expected[moved])
    assert torch.equal(job.param[~moved].view(torch.int32), before[~moved].view(torch.int32))
    assert int((job.exp_avg_sq != 0).sum()) == int((moved & (job.grad != 0)).sum())


@pytest.mark.parametrize("density", [None, 0.3, 0.01])
@pytest.mark.parametrize("rule", ["masked", "differentiated"])
def test_gradient_statistics(device, density, rule):
    scale = torch.tensor(16.0, device=device)
    settings = with_settings(clip_value=0.5, grad_scale=scale)
    rig = Rig(device, [(700,), (5, 13), (0,)], settings, density=density, rule="masked" if density is None else rule)
    jobs, combined = rig.jobs()
    truth = torch.cat([(g / 16).clamp(-0.5, 0.5) for g in combined]).square().sum()
    found = gradstats.gradstats(jobs, settings, rig.cache)
    torch.testing.assert_close(found.cpu()[0], truth, rtol=1e-6, atol=0)
    assert found[1] == 0
    assert torch.equal(found, gradstats.gradstats(jobs, settings, {})), "two runs differ"
    lane = int(rig.ones[0].lanes.view(-1).nonzero()[0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        jobs[0].grad.view(-1)[lane] = bad
        assert gradstats.gradstats(jobs, settings, rig.cache)[1] == 1


def test_tables_are_kept_until_something_moves(device):
    n = 5 * adam_lanes.BLOCK + 3
    keep = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.3
    bits = reference.pack_bits(keep).to(device)
    param, grad = torch.zeros(n, device=device), torch.ones(n, device=device)
    job, cache = job_of(param, grad, bits), {}
    dense = job_of(torch.zeros(9, device=device), torch.ones(9, device=device))

    def plan():
        adam.step([job, dense], SETTINGS, cache)
        (kept,) = cache.values()
        return kept

    first = plan()
    assert plan() is first
    job = replace(job, grad=-grad)
    second = plan()
    assert second.table is not first.table, "a reallocated gradient was not noticed"
    assert second.launches is first.launches
    start = param.clone()
    job.param.zero_()
    plan()
    assert torch.equal(param != 0, keep.to(device))
    assert not torch.equal(param, start)

    bits.copy_(reference.pack_bits(~keep))  # in place
    wide = int((~keep).sum())
    job = replace(job, exp_avg=torch.zeros(wide, device=device), exp_avg_sq=torch.zeros(wide, device=device))
    job.param.zero_()
    third = plan()
    assert third.launches is not first.launches, "a mask changed in place was not noticed"
    assert torch.equal(param != 0, ~keep.to(device))


def test_gradients_are_given_back(device):
    job, cache = job_of(torch.zeros(9, device=device), torch.ones(9, device=device)), {}
    for _ in range(2):
        adam.step([job], SETTINGS, cache)
        held = weakref.ref(job.grad)
        job = replace(job, grad=torch.ones(9, device=device))
        assert held() is None


def test_what_a_capture_may_change(device, monkeypatch):
    """Gradients may have moved: their addresses go into tables that nothing else uses. Masks and layouts may not."""
    ones = torch.ones(9, device=device)
    job, cache = job_of(torch.zeros_like(ones), ones), {}
    adam.step([job], SETTINGS, cache)
    (plan,) = cache.values()
    spares = [(torch.zeros_like(plan.table), torch.zeros_like(plan.table)) for _ in range(adam_plan.SPARES)]
    plan.spares = list(spares)
    monkeypatch.setattr(adam_plan, "_capturing", lambda device: True)
    adam.step([job], SETTINGS, cache)
    assert cache["captured"][0].table is plan.table
    for captured, factor in enumerate((-1, -2), start=1):
        moved = replace(job, grad=factor * ones)
        adam.step([moved], SETTINGS, cache)
        pinned, table = spares[-captured]
        assert cache["captured"][captured].table is table
        assert cache["captured"][captured].spares[0][0] is pinned, "a graph copies out of freed memory"
    assert bool((job.exp_avg < 0.09).all()), "the new gradient was not used"
    assert [value for key, value in cache.items() if key != "captured"] == [plan]
    assert plan.spares == []
    with pytest.raises(PeckerKernelsError, match="take one step between"):
        adam.step([replace(job, grad=2 * ones)], SETTINGS, cache)
    with pytest.raises(PeckerKernelsError, match="before capturing"):
        adam.step([job_of(torch.zeros_like(ones), ones)], SETTINGS, cache)
    with pytest.raises(PeckerKernelsError, match="layout of a tensor changed"):
        adam.step([replace(job, exp_avg=None)], with_settings(beta1=0.0), cache)


def test_a_subset_of_the_tensors_has_a_plan_of_its_own(device):
    jobs, cache = [job_of(torch.zeros(9, device=device), torch.ones(9, device=device)) for _ in range(3)], {}
    adam.step(jobs, SETTINGS, cache)
    adam.step(jobs[1:], SETTINGS, cache)
    assert [bool((job.exp_avg_sq > 0.0015).all()) for job in jobs] == [False, True, True]
    for i in range(2 * adam_plan.KEPT_PLANS):
        adam.step([job_of(torch.zeros(1, device=device), torch.ones(1, device=device))], SETTINGS, cache)
        assert len(cache) <= adam_plan.KEPT_PLANS, f"step {i} kept a stale plan"


def test_layouts_without_a_mask(device):
    """channels_last weights are walked as they lie; a gradient in another layout is copied into theirs."""
    shape = (4, 3, 5, 2)
    value, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
    results = []
    for param_format in (torch.contiguous_format, torch.channels_last):
        for grad_format in (torch.contiguous_format, torch.channels_last):
            param = value.clone(memory_format=param_format)
            adam.step([job_of(param, grad.clone(memory_format=grad_format))], SETTINGS, {})
            results.append(param)
    assert all(torch.equal(results[0], r) for r in results)
    expanded = job_of(value.clone(), torch.ones((), device=device).expand(shape))
    adam.step([expanded], SETTINGS, {})
    assert not torch.equal(expanded.param, value)


def refused(device):
    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=device)

    square, bits = ones(4, 6), torch.full((3,), 0x55, dtype=torch.uint8, device=device)
    yield "float64 weights are not served by Triton", job_of(ones(3, dtype=torch.float64), ones(3)), {}
    yield "grad is torch.float64", job_of(ones(3), ones(3, dtype=torch.float64)), {}
    yield "grad is torch.float32", job_of(ones(3), ones(4)), {}
    yield "masked weights must be contiguous", job_of(square.t(), square.t(), bits), {}
    yield "weights must be dense in memory", job_of(ones(4, 6)[:, ::2], ones(4, 3)), {}
    bf16 = ones(4, 6, dtype=torch.bfloat16)
    yield "stochastic rounding counts weights in row-major order", job_of(bf16.t(), bf16.t()), {}
    yield "exp_avg must be float32", job_of(ones(3), ones(3), exp_avg=ones(3, dtype=torch.float16)), {}
    yield "exp_avg_sq .* must be laid out", job_of(square, square, exp_avg_sq=ones(6, 4).t()), {}
    yield "compact state of 5 values for 12 kept", job_of(square, square, bits, exp_avg=ones(5)), {}
    yield "step must be float32", job_of(square, square, step=ones(1).long()), {}
    yield "exp_avg may be missing only where beta1 is 0", job_of(square, square, exp_avg=None), {}
    yield "found_inf must be one float32", job_of(square, square), {"found_inf": ones(1).double()}
    yield "grad_scale must be one float32", job_of(square, square), {"grad_scale": ones(2)}


def test_what_is_not_served_is_refused_before_anything_is_written(device):
    for message, job, changes in refused(device):
        good = job_of(torch.ones(3, device=device), torch.ones(3, device=device))
        with pytest.raises(PeckerKernelsError, match=message):
            adam.step([good, job], replace(SETTINGS, **changes), {})
        assert bool((good.param == 1).all())
        assert bool((job.param == 1).all())


def test_formulas():
    full, tenth = adam.adam_bytes(10**6), adam.adam_bytes(10**6, lanes=10**5, kind="bitmap")
    assert full == 28e6
    assert 8.5e6 < tenth < 8.7e6
    assert adam.adam_bytes(10**6, lanes=10**6, exp_avg=False) == 20e6
    assert adam.adam_flops(10) == 10 * adam.adam_flops(1) > adam.adam_flops(10, exp_avg=False)
