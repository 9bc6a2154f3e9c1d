"""The operations of torch.ops.pecker give what reference.py gives, count the FLOPs that spec.py says and refuse the rest."""

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import check_accuracy, ulp
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.spec import SPECS
from torch.utils.flop_counter import FlopCounterMode

OPS = torch.ops.pecker
IMPLS = ["auto", "reference", *(["cpu"] if cpu.available() else [])]
SHAPES = ((65,), (33, 70), (), (0,), (9, 3, 5))
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "decoupled_weight_decay": False}


def normal(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def keeps_of(density=0.4):
    return [torch.rand(s, generator=torch.Generator().manual_seed(i)) < density for i, s in enumerate(SHAPES)]


def differentiated(grads, masked_grads, keeps, dtype):
    """The gradient of the rule, written out."""
    return [torch.where(m, g.to(dtype) + h.to(dtype), g.to(dtype)) for g, h, m in zip(grads, masked_grads, keeps)]


def truth_of(params, grads, dtype, clips, step=3):
    """(weights, exp_avgs, exp_avg_sqs) after a step of reference.adam_ from moments of 0.1 and 0.2."""
    p, g = [t.to(dtype, copy=True) for t in params], [t.to(dtype, copy=True) for t in grads]
    m, v = [torch.full_like(t, 0.1) for t in p], [torch.full_like(t, 0.2) for t in p]
    reference.clip_(g, clips.get("clip_value"), clips.get("clip_norm"))
    for tensors in zip(p, g, m, v):
        reference.adam_(*tensors, step, **SETTINGS)
    return p, m, v


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clips", [{}, {"clip_value": 0.7, "clip_norm": 3.0}], ids=["plain", "clipped"])
def test_differentiated_step(impl, dtype, clips):
    keeps, grads, masked_grads = keeps_of(), normal(1, dtype), normal(2, dtype)
    # NaN outside the mask is not read.
    masked_grads = [torch.where(m, h, float("nan")) for m, h in zip(keeps, masked_grads)]
    params = [torch.zeros_like(g) for g in grads]  # a step from zero is its own update
    m, v = [torch.full_like(p, 0.1) for p in params], [torch.full_like(p, 0.2) for p in params]
    average = [torch.ones_like(p) for p in params]
    bits = [reference.pack_bits(keep) for keep in keeps]
    more = {"masked_grads": masked_grads, "emas": average, "ema": 0.9}
    OPS.masked_adam_(params, grads, bits, m, v, 3, **SETTINGS, **clips, impl=impl, **more)
    total = differentiated(grads, masked_grads, keeps, dtype)
    peer = truth_of([torch.zeros_like(p) for p in params], total, dtype, clips)
    exact = differentiated(grads, masked_grads, keeps, torch.float64)
    truth = truth_of([torch.zeros_like(p) for p in params], exact, torch.float64, clips)
    for found, near, far in zip((params, m, v), peer, truth):
        for tensors in zip(found, near, far):
            check_accuracy(*tensors)
    assert all(bool((p != 0).all()) for p in params)
    for e, p in zip(average, params):
        check_accuracy(e, torch.ones_like(p).lerp(p, 1 - 0.9), 1 + (1 - 0.9) * (p.double() - 1))
    assert torch.equal(grads[0], normal(1, dtype)[0])
    if impl == "reference":
        assert all(torch.equal(p, q) for p, q in zip(params, peer[0]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["salient", "differentiated"])
def test_forms_are_what_the_optimizer_does(impl, form):
    """MaskedAdam, with bfloat16 weights, no first moment, average, clipping and stochastic rounding."""
    named = dict(zip("abcde", [torch.nn.Parameter(p) for p in normal(0, torch.bfloat16)]))
    mask = pk.SaliencyMask.random(named, 0.4)
    settings = {"lr": 1e-2, "clip_norm": 1.0, "seed": 11, "ema": 0.5, "impl": impl}
    optimizer = pk.MaskedAdam(named.items(), mask, betas=(0.0, 0.99), **settings)
    params = [p.detach().clone() for p in named.values()]
    state = [torch.zeros(p.shape if form == "differentiated" else mask.count_of(n)) for n, p in named.items()]
    average = [p.float() if form == "differentiated" else p[mask.bool(n)].float() for n, p in zip(named, params)]
    for i in range(3):
        grads, masked_grads = normal(2 * i + 1, torch.bfloat16), normal(2 * i + 2)
        for p, g in zip(named.values(), grads):
            p.grad = g
        optimizer.step(masked_grads if form == "differentiated" else None)
        more = {"masked_grads": masked_grads} if form == "differentiated" else {}
        OPS.masked_adam_(
            params, grads, list(mask.bits.values()), [], state, i + 1, beta1=0.0, beta2=0.99, emas=average, **more, **settings
        )  # fmt: skip
    assert any(not torch.equal(p, q) for p, q in zip(params, normal(0, torch.bfloat16)))
    for p, q, v, e in zip(named.values(), params, state, average):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"].view(-1), v.view(-1))
        assert torch.equal(optimizer.state[p]["ema"].view(-1), e.view(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_carry_the_truth_of_16_bit_weights(impl, dtype):
    keeps, grads = keeps_of(), normal(1)
    bits = [reference.pack_bits(keep) for keep in keeps]
    before = normal(0, dtype)
    params = [p.clone() for p in before]
    masters = [p[m].float() for p, m in zip(params, keeps)]
    # The same step on float32 weights.
    twins, moments = [p.float() for p in params], [[torch.zeros_like(t) for t in masters] for _ in range(4)]
    for i in range(3):
        OPS.masked_adam_(params, grads, bits, *moments[:2], i + 1, **SETTINGS, impl=impl, masters=masters)
        OPS.masked_adam_(twins, grads, bits, *moments[2:], i + 1, **SETTINGS, impl=impl)
    for p, q, m, master, twin in zip(params, before, keeps, masters, twins):
        assert torch.equal(p[~m].view(torch.int16), q[~m].view(torch.int16))
        assert torch.equal(p[m], master.to(dtype))
        torch.testing.assert_close(master, twin[m], rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_is_the_references():
    p, g, v = [torch.ones(1000, dtype=torch.bfloat16)] * 2, [torch.ones(1000)] * 2, [torch.ones(1000), torch.ones(1000)]
    rounded = []
    for seed in (1, 1, 2):
        params = [t.clone() for t in p]
        OPS.masked_adam_(params, g, [], [], [t.clone() for t in v], 4, lr=1e-3, beta1=0.0, seed=seed, impl="reference")
        rounded.append(torch.cat(params))
    exact = [torch.ones(1000), torch.ones(1000)]
    OPS.masked_adam_(exact, g, [], [], v, 4, lr=1e-3, beta1=0.0, impl="reference")
    bits16 = reference.random_bits16(torch.arange(2000), 1, 4)
    assert torch.equal(rounded[0], reference.stochastic_round_bf16(torch.cat(exact), bits16))
    assert torch.equal(rounded[0], rounded[1])
    assert not torch.equal(rounded[0], rounded[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
def test_accumulate(impl, dtype, reduction):
    scores, grads = [s.abs() for s in normal(1)], normal(2, dtype)
    grads[1] = grads[1].t().contiguous().t()
    truth = [reference.accumulate_(s.clone(), g, reduction) for s, g in zip(scores, grads)]
    versions = [s._version for s in scores]
    OPS.accumulate_(scores, grads, reduction, impl)
    for found, expected in zip(scores, truth):
        # "square" may be one fused operation, see SaliencyScores.
        assert bool(((found - expected).abs().double() <= ulp(expected) * (reduction == "square")).all())
    assert all(s._version > before for s, before in zip(scores, versions))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "square"])
def test_contrast(impl, reduction):
    scores = [s if reduction == "sum" else s.square() for s in normal(1)]
    squares = [s.square() for s in normal(2)]
    size = [s.abs() for s in scores]
    mean = torch.cat([(q.double() / 5).sqrt().view(-1) for q in squares]).mean()
    peer = [reference.contrast_(s.clone(), q, 5, 0.01 * float(mean)) for s, q in zip(size, squares)]
    truth = [reference.contrast_(s.double(), q.double(), 5, 0.01 * float(mean)) for s, q in zip(size, squares)]
    OPS.contrast_(scores, squares, 5, reduction, floor=0.01, impl=impl)
    for tensors in zip(scores, peer, truth):
        check_accuracy(*tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 700, 2000])
def test_selection(impl, dtype, k):
    scores = [(s.abs() * 4).round().to(dtype) / 4 for s in normal(1)]  # ties
    found = OPS.kth_largest(scores, k, impl)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert float(found) == reference.kth_largest(scores, k)
    kept = [reference.pack_bits(keep) for keep in reference.keep_top_k(scores, k)]
    assert all(torch.equal(a, b) for a, b in zip(OPS.keep_top_k(scores, k, impl), kept, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("clip_value", [None, 0.5])
def test_clip_norm_factor(impl, dtype, masked, clip_value):
    keeps = keeps_of(0.4 if masked else 1.0)
    grads = [g.t().contiguous().t() if g.dim() == 2 else g for g in normal(1, dtype)]
    kept = [g[m].double() if clip_value is None else g[m].double().clamp(-0.5, 0.5) for g, m in zip(grads, keeps)]
    truth = reference.clip_norm_factor(kept, 3.0)
    assert float(truth) < 1
    bits = [reference.pack_bits(keep) for keep in keeps] if masked else []
    for g, m in zip(grads, keeps):
        g[~m] = float("nan")  # not read
    found = OPS.clip_norm_factor(grads, bits, 3.0, clip_value, impl)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == pytest.approx(float(truth), rel=1e-14 if dtype == torch.float64 else 1e-6)
    assert float(OPS.clip_norm_factor(grads, bits, 1e6, clip_value, impl)) == 1
    grads[1][keeps[1]] = float("nan")
    assert OPS.clip_norm_factor(grads, bits, 3.0, clip_value, impl).isnan()


def test_thresholds_and_factors_are_constants_to_autograd():
    x = torch.ones(4, requires_grad=True)
    gradient = (x * torch.arange(4.0)).square()
    threshold, factor = OPS.kth_largest([gradient], 2), OPS.clip_norm_factor([gradient], [], 1.0)
    assert not threshold.requires_grad
    assert not factor.requires_grad
    (gradient * factor - threshold).sum().backward()
    assert torch.equal(x.grad, 2 * torch.arange(4.0).square() * factor)


def test_flops_are_those_of_the_specs():
    keeps, scores, density = [torch.arange(n) % 4 == 0 for n in (100, 28)], [torch.ones(100), torch.ones(28)], 0.25
    bits, n = [reference.pack_bits(keep) for keep in keeps], 128

    def count(operation, *arguments, **named):
        with FlopCounterMode(display=False) as counter:
            operation(*arguments, **named)
        return counter.get_total_flops()

    def fresh(shrink=1):
        return [torch.ones(s.numel() // shrink) for s in scores]

    adam = SPECS["masked_adam_"].flops
    assert count(OPS.masked_adam_, fresh(), scores, bits, fresh(4), fresh(4), 1) == adam(n, density)
    averaged = {"emas": fresh(4), "ema": 0.9}
    assert (
        count(OPS.masked_adam_, fresh(), scores, bits, [], fresh(4), 1, beta1=0.0, **averaged)
        == adam(n, density) + 3 * 32
    )
    rule = {"masked_grads": scores}
    assert count(OPS.masked_adam_, fresh(), scores, bits, fresh(), fresh(), 1, **rule) == SPECS[
        "differentiated_adam_"
    ].flops(n, density)
    for name, arguments in {
        "accumulate_": (fresh(), scores, "square"),
        "contrast_": (fresh(), scores, 1, "abs"),
        "kth_largest": (scores, 5),
        "keep_top_k": (scores, 5),
        "clip_norm_factor": (scores, bits, 1.0),
        "pack_bits": (keeps[0],),
        "unpack_bits": (bits[0], 100),
        "popcount": (bits[0],),
        "apply_": (scores[0], bits[0]),
    }.items():
        assert count(getattr(OPS, name), *arguments) == SPECS[name].flops(n, density), name
    assert count(OPS.accumulate_, fresh(), scores, "sum") == n
    tiles = torch.tensor([[0, 0, 0, 16], [16, 16, 256, 16]])  # of [32, 32]: half of the weights, at 9 positions
    product = SPECS["tile_weight_grad"].flops(32 * 32, 0.5)
    assert count(OPS.tile_weight_grad, torch.ones(9, 32), torch.ones(9, 32), tiles, 512, 16, 16) == 9 * product


def test_refusals():
    p, g, v = torch.zeros(10), torch.ones(10), torch.zeros(4)
    bits = pk.SaliencyMask.random({"a": p}, 0.4).bits["a"]

    def refuses(match, *arguments, error=pk.PeckerKernelsError, **named):
        with pytest.raises(error, match=match):
            OPS.masked_adam_(*arguments, **{"beta1": 0.0, **named})

    refuses("masked_grads has 2", [p], [g], [bits], [], [v], 1, masked_grads=[g, g])
    refuses("one value for each of its 10", [p], [g], [bits], [], [v], 1, masked_grads=[g], error=pk.MaskError)
    refuses(r"masked_grads\[0\] is \[5\]", [p], [g], [bits], [], [g.clone()], 1, masked_grads=[g[:5]])
    refuses(r"grads\[0\] is \[5\]", [p], [g[:5]], [bits], [], [v], 1)
    refuses("come together", [p], [g], [bits], [], [v], 1, ema=0.9)
    refuses("come together", [p], [g], [bits], [], [v], 1, emas=[v])
    refuses("come together", [p], [g], [bits], [], [v], 1, emas=[v], ema=1.5)
    refuses("seed", [p], [g], [bits], [], [v], 1, seed=-1)
    refuses("pass float32 masters", [p.half()], [g], [bits], [], [v], 1)
    refuses("only 16-bit weights", [p], [g], [bits], [], [v], 1, masters=[v])
    refuses("keep it in torch.float32", [p.bfloat16()], [g], [bits], [], [v.bfloat16()], 1)
    refuses("only floating weights", [p.int()], [g], [bits], [], [v], 1)
    assert not p.any()
    for match, operation, arguments in (
        ("grads has 0", OPS.accumulate_, ([g], [], "sum")),
        ("unknown reduction 'mean'", OPS.accumulate_, ([g], [g], "mean")),
        ("contiguous float32", OPS.accumulate_, ([g.double()], [g], "sum")),
        (r"shape \[10\]", OPS.accumulate_, ([g], [g[:5]], "sum")),
        ("contiguous float32", OPS.contrast_, ([g], [g.double()], 1, "sum")),
        ("at least 1", OPS.contrast_, ([g], [g], 0, "sum")),
        ("floor", OPS.contrast_, ([g], [g], 1, "sum", 0.0)),
        ("every retain gradient is zero", OPS.contrast_, ([g], [p], 1, "sum")),
        ("tensor 0 hold NaN", OPS.contrast_, ([g], [p + float("nan")], 1, "sum")),
        ("k must be", OPS.kth_largest, ([g], 11)),
        ("k must be", OPS.keep_top_k, ([], 1)),
        ("bits has 1", OPS.clip_norm_factor, ([g, g], [bits], 1.0)),
        ("impl='triton'", OPS.clip_norm_factor, ([g.double()], [], 1.0, None, "triton")),
    ):
        with pytest.raises(pk.PeckerKernelsError, match=match):
            operation(*arguments)
    assert bool((g == 1).all())
