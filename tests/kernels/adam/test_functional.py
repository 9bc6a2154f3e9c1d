"""MaskedAdam's arithmetic: against torch.optim.Adam, against mask-multiply + Adam, and the differentiated rule."""

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import (
    check_accuracy,
    check_untouched,
    fill_grads,
    small_model,
    snapshot,
    updates_and_moments,
)
from pecker_kernels import reference
from pecker_kernels.adam import cpu as cpu_adam
from pecker_kernels.adam import foreach
from pecker_kernels.adam.lanes import Lanes
from pecker_kernels.torch_library import adam as ops

IMPLS = ["cpu", "reference"]
SETTINGS = [
    {"betas": (0.0, 0.999)},
    {"betas": (0.9, 0.95), "eps": 1e-6},
    {"betas": (0.0, 0.99), "weight_decay": 0.1},
    {"betas": (0.9, 0.999), "weight_decay": 0.1},
    {"betas": (0.0, 0.999), "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"betas": (0.5, 0.999), "weight_decay": 0.1, "decoupled_weight_decay": True},
]


def peer(model, settings, **kwargs):
    return torch.optim.Adam(model.named_parameters(), lr=1e-3, **settings, **kwargs)


def check_adam(settings, dtype=torch.float32, impl="cpu", keep=None, **kwargs):
    """The accuracy gate over a few steps; `keep` multiplies the peers' gradients by the mask."""

    def ours(model):
        return pk.MaskedAdam(model.named_parameters(), lr=1e-3, impl=impl, **settings, **kwargs)

    def torchs(model):
        return peer(model, settings, fused=impl != "reference", foreach=False)

    found = dict(updates_and_moments(ours, dtype))
    same = dict(updates_and_moments(torchs, dtype, keep=keep))
    truth = dict(updates_and_moments(torchs, torch.float64, keep=keep))
    assert set(found) == set(same)
    for what, value in found.items():
        if settings["betas"][0] == 0 and what.startswith("exp_avg "):
            assert not value.any()
        else:
            check_accuracy(value, same[what], truth[what])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_mask_it_is_torch_adam(settings, impl):
    check_adam(settings, impl=impl)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "weight_decay" not in s], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("state", ["compact", "dense"])
def test_masked_is_multiply_then_adam(settings, impl, state):
    mask = pk.SaliencyMask.random(small_model().named_parameters(), 0.4)
    check_adam(settings, impl=impl, state=state, mask=mask, keep=mask.bool)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bit_equal_to_the_fused_optimizer(settings):
    ours, theirs = small_model(), small_model()
    a, b = pk.MaskedAdam(ours.named_parameters(), lr=1e-3, **settings), peer(theirs, settings, fused=True)
    for i in range(4):
        for model, optimizer in ((ours, a), (theirs, b)):
            grads = fill_grads(model, seed=i)
            optimizer.step()
            assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("state", ["compact", "dense"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_moves_salient_weights_alone(state, decoupled):
    model, theirs = small_model(), small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.5)
    settings = {"betas": (0.9, 0.999), "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    before = snapshot(model)
    a = pk.MaskedAdam(model.named_parameters(), mask, lr=1e-2, state=state, **settings)
    b = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=True, **settings)
    for i in range(3):
        fill_grads(model, seed=i)
        fill_grads(theirs, seed=i)
        a.step()
        b.step()
    check_untouched(model, before, mask)
    for (name, p), q in zip(model.named_parameters(), theirs.parameters()):
        # Not bit-equal: a fused kernel rounds vector lanes and the ragged end differently, and compacting moves lanes.
        torch.testing.assert_close(p[mask.bool(name)], q[mask.bool(name)], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("settings", [{}, {"clip_value": 1e-3}, {"clip_norm": 1e-2}], ids=str)
def test_differentiated_rule_is_adam_on_the_combined_gradient(settings, as_list):
    model, theirs = small_model(), small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.3)
    a = pk.MaskedAdam(model.named_parameters(), mask, lr=1e-3, betas=(0.0, 0.999), **settings)
    b = torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.0, 0.999), fused=True)
    for i in range(3):
        forget = fill_grads(model, seed=100 + i, skip=("unused", "1.bias"))
        retain = fill_grads(model, seed=i, skip=("unused", "scale"))
        model.scale.grad = None
        given = dict(forget)
        a.step([forget.get(name) for name, _ in model.named_parameters()] if as_list else forget)
        for name, p in theirs.named_parameters():
            terms = [retain[name]] if name in retain else []
            terms += [forget[name] * mask.bool(name)] if name in forget else []
            p.grad = sum(terms) if terms else None
        if "clip_value" in settings:
            torch.nn.utils.clip_grad_value_(theirs.parameters(), settings["clip_value"])
        if "clip_norm" in settings:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings["clip_norm"])
        b.step()
        assert all(forget[name] is given[name] for name in forget)
        for (name, p), q in zip(model.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
            if name in retain:
                assert torch.equal(p.grad, retain[name])
    assert a.state[model[2].weight]["exp_avg_sq"].shape == model[2].weight.shape


def test_masked_grads_outside_the_mask_are_never_read():
    model = small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.3)
    optimizer = pk.MaskedAdam(model.named_parameters(), mask, betas=(0.0, 0.999))
    fill_grads(model, seed=0)
    poison = {n: torch.full(p.shape, float("nan")) for n, p in model.named_parameters()}
    for name in poison:
        poison[name][mask.bool(name)] = 1.0
    optimizer.step(masked_grads=poison)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(pk.PeckerKernelsError, match="'other'"):
        optimizer.step(masked_grads={"other": torch.ones(1)})
    with pytest.raises(pk.PeckerKernelsError, match="'scale' has shape"):
        optimizer.step(masked_grads={"scale": torch.ones(1)})
    with pytest.raises(pk.PeckerKernelsError, match="2 entries for"):
        optimizer.step(masked_grads=[None, None])


def test_compact_steps_before_the_first_differentiated_one():
    models = [small_model(), small_model()]
    mask = pk.SaliencyMask.random(models[0].named_parameters(), 0.3)
    made = [
        pk.MaskedAdam(m.named_parameters(), mask, betas=(0.5, 0.9), state=s)
        for m, s in zip(models, ("compact", "dense"))
    ]
    for i in range(4):
        for model, optimizer in zip(models, made):
            fill_grads(model, seed=i)
            optimizer.step(masked_grads=None if i in (0, 3) else fill_grads(model, seed=50 + i))
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("impl", IMPLS)
def test_clipping_counts_kept_weights(impl):
    model = small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.3)
    optimizer = pk.MaskedAdam(
        model.named_parameters(), mask, betas=(0.9, 0.999), clip_value=0.01, clip_norm=0.02, impl=impl
    )
    grads = fill_grads(model, seed=4)
    optimizer.step()
    kept = {name: g.clamp(-0.01, 0.01)[mask.bool(name)] for name, g in grads.items()}
    norm = torch.cat([k.reshape(-1) for k in kept.values()]).norm()
    assert norm > 0.02
    for name, p in model.named_parameters():
        if name in kept:
            expected = kept[name].reshape(-1) * (0.02 / (norm + 1e-6))
            torch.testing.assert_close(
                optimizer.state[p]["exp_avg"].reshape(-1), 0.1 * expected, rtol=1e-5, atol=1e-12, msg=name
            )
            assert torch.equal(p.grad, grads[name])


def test_strided_weights_and_gradients():
    torch.manual_seed(0)
    weights = [torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), torch.randn(5, 7).t()]
    grads = [torch.randn(4, 6, 3, 3), torch.randn(7, 5)]
    for betas in ((0.0, 0.999), (0.9, 0.999)):
        for density in (0.4, 1.0):
            results = []
            for strided in (True, False):
                ps = [torch.nn.Parameter(w.clone() if strided else w.contiguous()) for w in weights]
                for p, g in zip(ps, grads):
                    p.grad = g.clone()
                named = [("a", ps[0]), ("b", ps[1])]
                mask = pk.SaliencyMask.random(named, density)
                for state in ("compact", "dense"):
                    optimizer = pk.MaskedAdam(named, mask, betas=betas, state=state, ema=0.5)
                    optimizer.step()
                    optimizer.step(masked_grads={"a": grads[0]} if state == "dense" else None)
                results.append([*(p.detach() for p in ps), *optimizer.ema_weights().values()])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_ema_is_the_average_of_the_weights():
    for masked in (False, True):
        for state in ("compact", "dense"):
            model = small_model()
            mask = pk.SaliencyMask.random(model.named_parameters(), 0.3) if masked else None
            optimizer = pk.MaskedAdam(model.named_parameters(), mask, betas=(0.0, 0.999), ema=0.9, state=state)
            expected = snapshot(model)
            for i in range(3):
                fill_grads(model, seed=i)
                optimizer.param_groups[0]["ema"] = min(0.9, (1 + i) / (10 + i))
                optimizer.step()
                for name, p in model.named_parameters():
                    expected[name].lerp_(p.detach(), 1 - optimizer.param_groups[0]["ema"])
            for name, value in optimizer.ema_weights().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_all_finite():
    good = [torch.randn(5), torch.zeros(0), None, torch.tensor(3.0, dtype=torch.bfloat16), torch.ones(2, 2).double()]
    assert bool(pk.all_finite(good))
    assert bool(pk.all_finite([]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = torch.randn(1000)
        broken[777] = bad
        assert not bool(pk.all_finite([*good, broken]))


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_functional_form_is_the_optimizer(density, impl):
    model, other = small_model(), small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), density)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "clip_value": 0.5, "clip_norm": 1.0, "eps": 1e-6}
    optimizer = pk.MaskedAdam(model.named_parameters(), mask, betas=(0.9, 0.99), impl=impl, **settings)
    names = [name for name, _ in other.named_parameters() if name != "unused"]
    params = [dict(other.named_parameters())[name].detach() for name in names]
    moments = [[torch.zeros(mask.count_of(name)) for name in names] for _ in range(2)]
    bits = [mask.bits[name] for name in names] if density < 1 else []
    for i in range(3):
        grads = fill_grads(model, seed=i)
        optimizer.step()
        pk.masked_adam_(
            params, [grads[n] for n in names], bits, *moments, i + 1, beta1=0.9, beta2=0.99, impl=impl, **settings
        )
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bfloat16_weights_without_a_mask_move(impl):
    p = torch.nn.Parameter(torch.ones(65, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    pk.MaskedAdam([p], lr=0.1, impl=impl).step()
    torch.testing.assert_close(p.detach().float(), torch.full((65,), 0.9), rtol=2**-7, atol=0)


def test_functional_form_refusals_and_schema():
    p, g, v = torch.zeros(10), torch.ones(10), torch.zeros(4)
    bits = pk.SaliencyMask.random({"a": p}, 0.4).bits["a"]
    with pytest.raises(pk.PeckerKernelsError, match="exp_avgs has 0"):
        pk.masked_adam_([p], [g], [bits], [], [v], 1)
    with pytest.raises(pk.MaskError, match="one value for each of its 4"):
        pk.masked_adam_([p], [g], [bits], [], [torch.zeros(5)], 1, beta1=0.0)
    with pytest.raises(pk.PeckerKernelsError, match="counts from 1"):
        pk.masked_adam_([p], [g], [bits], [], [v], 0, beta1=0.0)
    with pytest.raises(pk.PeckerKernelsError, match="impl='triton'"):
        pk.masked_adam_([p], [g], [bits], [], [v], 1, beta1=0.0, impl="triton")
    with pytest.raises(pk.PeckerKernelsError, match="contiguous weights under a mask"):
        pk.masked_adam_([p.view(2, 5).t()], [g.view(5, 2)], [bits], [], [v], 1, beta1=0.0, impl="cpu")
    assert not p.any()
    torch.library.opcheck(
        ops.masked_adam_, ([p], [g], [bits], [], [v], 1, 1e-3, 0.0), test_utils=("test_schema", "test_faketensor")
    )


def nothing(*args, **kwargs):
    pass


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_fail_on_a_step_that_does_nothing(monkeypatch, impl):
    monkeypatch.setattr(cpu_adam, "step", nothing)
    monkeypatch.setattr(foreach, "adam_", nothing)
    with pytest.raises(AssertionError):
        check_adam(SETTINGS[0], impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_fail_on_a_wrong_bias_correction(monkeypatch, impl):
    real = pk.MaskedAdam._jobs

    def late(self, *args):
        jobs = real(self, *args)
        for job in jobs:
            job.step = self.state[job.param]["step"] = torch.ones(())
        return jobs

    monkeypatch.setattr(pk.MaskedAdam, "_jobs", late)
    with pytest.raises(AssertionError):
        check_adam(SETTINGS[1], impl=impl)


def test_gates_fail_when_the_mask_is_ignored(monkeypatch):
    monkeypatch.setattr(pk.MaskedAdam, "_lanes_of", lambda self, p, name: Lanes(p.shape))
    mask = pk.SaliencyMask.random(small_model().named_parameters(), 0.4)
    with pytest.raises(AssertionError):
        check_adam(SETTINGS[0], mask=mask, keep=mask.bool)
    model = small_model()
    before = snapshot(model)
    fill_grads(model, seed=0)
    pk.MaskedAdam(model.named_parameters(), mask).step()
    with pytest.raises(AssertionError, match="masked-out weights of"):
        check_untouched(model, before, mask)


def test_reference_formula_against_torch_in_float64():
    torch.manual_seed(0)
    p, g = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    q = torch.nn.Parameter(p.clone())
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    optimizer = torch.optim.Adam([q], lr=0.1, weight_decay=0.01)
    for step in range(1, 4):
        q.grad = g * step
        optimizer.step()
        reference.adam_(
            p, g * step, m, v, step,
            lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled_weight_decay=False,
        )  # fmt: skip
    torch.testing.assert_close(p, q.detach(), rtol=1e-12, atol=1e-12)
