"""The C++ Adam step at every instruction level: against float64, on lanes that lie any way, and on nothing but them."""

import itertools

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import check_accuracy, ulp
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.adam import cpu as cpu_adam
from pecker_kernels.adam.jobs import AdamJob, AdamStep
from pecker_kernels.adam.lanes import Lanes
from pecker_kernels.mask import bits as bitmask

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 257, 4095, 4096, 4097, 70_001)
DENSITIES = (0.003, 0.05, 0.12, 0.5, 0.97, 1.0)


def keep_of(n, density, seed=0, clustered=False):
    generator = torch.Generator().manual_seed(seed)
    if not clustered:
        return torch.rand(n, generator=generator) < density
    # Runs of kept weights with ragged ends: whole words, parts of words and dead stretches follow each other.
    keep = (torch.rand(n // 300 + 1, generator=generator) < density).repeat_interleave(300)[:n]
    return keep ^ (torch.rand(n, generator=generator) < 0.001)


def gradients(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 6)


SETTINGS = {
    "plain": {"betas": (0.9, 0.999)},
    "no exp_avg": {"betas": (0.0, 0.99)},
    "L2, clipped": {"betas": (0.3, 0.9), "weight_decay": 0.1, "clip_value": 0.05},
    "decoupled, average": {"betas": (0.9, 0.99), "weight_decay": 0.1, "decoupled_weight_decay": True, "ema": 0.7},
}


def check_average(p, before, after, decay, keep):
    """Judged on the weights of this run: where the sum cancels, a peer's average differs by what its weights differ."""
    p = p[keep] if after.shape != p.shape else p
    truth = before + (1 - decay) * (p.double() - before)
    room = 4 * ulp((p.abs() + before.abs()).to(p.dtype))
    moved = torch.ones_like(p, dtype=torch.bool) if after.shape != keep.shape else keep | (p != 0)
    assert bool(((after.double() - truth).abs() <= room)[moved].all())


def run(keep, settings, dtype, impl, steps=3, state="compact", differentiated=False):
    """Weights start at zero so that they are the update; values outside the mask are NaN where no one may read them."""
    p = torch.nn.Parameter(torch.zeros(keep.shape, dtype=dtype))
    mask = pk.SaliencyMask({"p": bitmask.pack_bits(keep)}, {"p": keep.shape})
    optimizer = pk.MaskedAdam([("p", p)], mask, lr=1.0, impl=impl, state=state, **settings)
    nan = torch.full(keep.shape, float("nan"), dtype=dtype)
    out = []
    for i in range(steps):
        with torch.no_grad():
            p.zero_()
        p.grad = gradients(p.numel(), i).to(dtype)
        extra = None
        if differentiated:
            extra = {"p": torch.where(keep, gradients(p.numel(), 100 + i).to(dtype), nan)}
        else:
            p.grad = torch.where(keep, p.grad, nan)
        average = optimizer.state[p]["ema"].double().clone() if i and "ema" in settings else torch.zeros(())
        optimizer.step(masked_grads=extra)
        if "ema" in settings:
            check_average(p.detach(), average, optimizer.state[p]["ema"], settings["ema"], keep)
        if differentiated:
            out.append(p.detach().clone())
        else:
            assert not p.detach()[~keep].view(torch.uint8).any(), "a weight outside the mask was written"
            out.append(p.detach()[keep])
        values = optimizer.state[p]
        where = torch.ones_like(keep) if differentiated or state == "compact" else keep
        for key in ("exp_avg", "exp_avg_sq"):
            if key in values:
                flat = values[key].reshape(-1)
                out.append(flat[where] if flat.numel() == p.numel() else flat.clone())
                if flat.numel() == p.numel() and not differentiated:
                    assert not flat[~keep].view(torch.uint8).any(), "state outside the mask was written"
    return out


def check(keep, settings, **kwargs):
    found = run(keep, settings, torch.float32, "cpu", **kwargs)
    peer = run(keep, settings, torch.float32, "reference", **kwargs)
    truth = run(keep, settings, torch.float64, "reference", **kwargs)
    assert len(found) == len(peer) == len(truth)
    for a, b, c in zip(found, peer, truth):
        check_accuracy(a, b, c)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("clustered", [False, True])
def test_accuracy(level, name, clustered):
    for n, density in itertools.product(SIZES, DENSITIES):
        check(keep_of(n, density, seed=n, clustered=clustered), SETTINGS[name], steps=2)


@pytest.mark.parametrize("name", SETTINGS)
def test_full_size_state_and_the_differentiated_rule(level, name):
    for n, density in itertools.product((1, 65, 4097, 20_011), (0.05, 0.5, 1.0)):
        keep = keep_of(n, density, seed=n, clustered=density == 0.5)
        check(keep, SETTINGS[name], steps=2, state="dense")
        check(keep, SETTINGS[name], steps=2, differentiated=True)


@pytest.mark.parametrize("master", [None, "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_give_what_the_wide_step_gives(level, dtype, master):
    """The same step on a float32 (float64) copy, rounded as the reference rounds."""
    if dtype == torch.float16 and master is None:
        pytest.skip("float16 weights need a master")
    n, work = 9_001, torch.float64 if dtype == torch.float64 else torch.float32
    for density, state in itertools.product((0.02, 0.3, 1.0), ("compact", "dense")):
        keep = keep_of(n, density)
        start = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
        grad = gradients(n, 2).to(dtype)
        bits = {"first": bitmask.full_bits(7), "p": bitmask.pack_bits(keep)}
        mask = pk.SaliencyMask(bits, {"first": (7,), "p": (n,)})
        made = []
        for values in (start.clone(), start.to(work)):
            first, p = torch.nn.Parameter(torch.zeros(7)), torch.nn.Parameter(values.clone())
            optimizer = pk.MaskedAdam(
                [("first", first), ("p", p)], mask, lr=0.05, impl="cpu", state=state, seed=3, ema=0.5,
                master=master if dtype != work and values.dtype == dtype else None,
            )  # fmt: skip
            p.grad = grad.to(values.dtype)
            optimizer.step()
            made.append((p.detach(), {k: v.reshape(-1) for k, v in optimizer.state[p].items()}))
        (ours, state_of), (wide, wide_state) = made
        expected = wide[keep]
        if dtype == torch.bfloat16 and master is None:
            index = keep.nonzero().view(-1) + 7
            expected = reference.stochastic_round_bf16(expected, reference.random_bits16(index, 3, 1))
        assert torch.equal(ours[keep], expected.to(dtype))
        assert torch.equal(ours[~keep], start[~keep])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state_of[key], wide_state[key])
        if "master" in state_of:
            lanes = slice(None) if state_of["master"].numel() < n else keep
            assert torch.equal(state_of["master"][lanes], wide[keep])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(level, dtype):
    n = 9_001
    for density in (0.05, 0.4):
        keep, g = keep_of(n, density), gradients(n, 2).to(dtype)
        weights = [torch.ones(n), torch.ones(n)]
        for p, grad in zip(weights, (g, g.float())):
            cpu_adam.step(jobs_of(keep, p, grad), settings_of(), {})
        assert torch.equal(*weights)


def jobs_of(keep, p, g, first_index=0, **state):
    lanes = Lanes(p.shape, bitmask.pack_bits(keep))
    v = state.get("exp_avg_sq", torch.zeros(lanes.count))
    return [
        AdamJob(
            p,
            g,
            None,
            lanes.bits,
            False,
            True,
            state.get("exp_avg"),
            v,
            None,
            None,
            torch.tensor(1.0),
            first_index,
            lanes,
        )
    ]


def settings_of(**changes):
    base = {
        "lr": 0.1, "beta1": 0.0, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False,
        "clip_value": None, "clip_norm": None, "ema": None, "seed": 5,
    }  # fmt: skip
    return AdamStep(**(base | changes))


def test_nothing_beside_the_tensors_is_touched(level):
    """Views into poisoned memory at odd offsets: neither read nor written outside."""
    for n, density, offset in itertools.product((1, 17, 65, 4099), (0.1, 0.9), (1, 3)):
        keep = keep_of(n, density, seed=n)
        count = int(keep.sum())

        def inside(size, fill, offset=offset):
            whole = torch.full((size + 64,), float("nan"))
            whole[offset : offset + size] = fill
            return whole, whole[offset : offset + size]

        buffers = [inside(n, 1.0), inside(n, 0.5), inside(count, 0.0), inside(count, 0.0)]
        (_, p), (_, g), (_, m), (_, v) = buffers
        cpu_adam.step(jobs_of(keep, p, g, exp_avg=m, exp_avg_sq=v), settings_of(beta1=0.5), {})
        for whole, view in buffers:
            assert int(whole.isnan().sum()) == 64
            assert bool(view.isfinite().all())
        assert bool((p[keep] < 1).all())


def test_stochastic_rounding_counts_on_beyond_two_to_the_32(level):
    n, first = 5000, (1 << 33) - 2500  # the borders of 32 bits lie inside the tensor
    keep = keep_of(n, 0.4)
    p, g = torch.ones(n), gradients(n, 0)
    half = p.to(torch.bfloat16)
    cpu_adam.step(jobs_of(keep, p, g), settings_of(), {})
    cpu_adam.step(jobs_of(keep, half, g, first_index=first), settings_of(), {})
    index = keep.nonzero().view(-1) + first
    expected = reference.stochastic_round_bf16(p[keep], reference.random_bits16(index, 5, 1))
    assert torch.equal(half[keep], expected)


def test_threads_do_not_change_a_bit(level):
    n = 1_000_003
    keep, g = keep_of(n, 0.2, clustered=True), gradients(n, 0)
    outcomes = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        p = torch.ones(n)
        jobs, s = jobs_of(keep, p, g), settings_of(clip_norm=1.0)
        outcomes.append((cpu_adam.grad_stats(jobs, s, {}), p, jobs[0].exp_avg_sq))
        cpu_adam.step(jobs, s, {})
    torch.set_num_threads(before)
    for stats, p, v in outcomes[1:]:
        assert stats == outcomes[0][0]
        assert torch.equal(p, outcomes[0][1])
        assert torch.equal(v, outcomes[0][2])


@pytest.mark.skipif(cpu.cpu_level_max() < 2, reason="needs AVX-512")
def test_vector_levels_agree_to_the_bit():
    outcomes = []
    for chosen in (1, 2):
        cpu.set_cpu_level(chosen)
        outcomes.append(run(keep_of(70_001, 0.3), SETTINGS["plain"], torch.float32, "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_statistics(level):
    for n, density in itertools.product((1, 65, 4097, 70_001), (0.05, 0.5)):
        keep = keep_of(n, density, seed=n)
        g = torch.where(keep, gradients(n, n), torch.full((n,), float("nan")))
        jobs = jobs_of(keep, torch.zeros(n), g)
        square_sum, finite = cpu_adam.grad_stats(jobs, settings_of(clip_value=0.01), {})
        truth = float(g[keep].double().clamp(-0.01, 0.01).square().sum())
        assert finite
        assert square_sum == pytest.approx(truth, rel=1e-6, abs=1e-30)
        for bad in (float("nan"), float("inf"), -float("inf")) if keep.any() else ():
            g[keep.nonzero().view(-1)[-1]] = bad
            assert not cpu_adam.grad_stats(jobs, settings_of(clip_value=0.01), {})[1]


def test_all_finite_of_every_dtype(level):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for n in (1, 17, 5000):
            values = torch.randn(n).to(dtype)
            assert bool(pk.all_finite([values, torch.ones(3, 4).t()]))
            values[-1] = float("inf")
            assert not bool(pk.all_finite([torch.ones(3), values]))


def broken(monkeypatch, change):
    """A library whose Adam call is `change(table rows, real)`."""
    real = cpu.library()

    class Library:
        def __getattr__(self, name):
            return getattr(real, name)

        def pecker_adam(self, rows, n, settings, threads):
            change(real, rows, n, settings, threads)

    monkeypatch.setattr(cpu, "library", Library)


def test_gates_fail_on_broken_kernels(monkeypatch):
    keep = keep_of(500, 0.3)
    check(keep, SETTINGS["plain"])

    def threefold(real, rows, n, settings, threads):
        for _ in range(3):
            real.pecker_adam(rows, n, settings, threads)

    for change in (lambda *_: None, threefold):
        with monkeypatch.context() as patch:
            broken(patch, change)
            with pytest.raises(AssertionError):
                check(keep, SETTINGS["plain"])
    # Ranks off by one lane: the right weights with their neighbours' moments.
    real_rank = cpu.rank_of
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "rank_of", lambda bits, n: (real_rank(bits, n) - 1).clamp_(min=0))
        with pytest.raises(pk.MaskError):
            check(keep_of(70_001, 0.3), SETTINGS["plain"])
