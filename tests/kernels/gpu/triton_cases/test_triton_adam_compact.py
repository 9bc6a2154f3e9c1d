"""Compact gradients in Triton: the step on dense gradients of the same values, to the bit."""

import pecker_kernels as pk
import pytest
import torch
from adam_rig import Rig, with_settings
from pecker_kernels.gpu import adam, adam_lanes, adam_plan, gradstats

SHAPES = [(150,), (5, 13), (7,), (), (0, 3), (1, 64)]
KINDS = {"bitmap": 0.0, "index": 2.0}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Every masked tensor as a bitmap, or as lists."""
    monkeypatch.setattr(adam_lanes, "INDEX_BELOW", KINDS[request.param])
    return request.param


def check(device, settings, shapes=SHAPES, broken=adam.step, **kwargs):
    """Each against the references, and one against the other."""
    rigs = [
        Rig(
            device,
            shapes,
            settings,
            one_sign=True,
            compact_grads=compact,
            step=broken if compact else adam.step,
            **kwargs,
        )
        for compact in (False, True)
    ]
    for _ in range(2):
        for rig in rigs:
            rig.step()
            rig.check()
    for one, other in zip(rigs[0].ones, rigs[1].ones):
        for name, guarded in one.tensors.items():
            ours = other.tensors[name].buffer
            assert torch.equal(guarded.buffer.view(torch.uint8), ours.view(torch.uint8)), f"{name} is another"
    return rigs[1]


EVERYTHING = {"weight_decay": 0.1, "clip_value": 1.0, "ema": 0.9, "lr": 0.5}


def settings_of(device, name):
    scale = {"grad_scale": torch.tensor(4.0, device=device)}
    return with_settings(**{"plain": {}, "no exp_avg": {"beta1": 0.0}, "everything": EVERYTHING | scale}[name])


@pytest.mark.parametrize("name", ["plain", "no exp_avg", "everything"])
@pytest.mark.parametrize("state", ["compact", "dense"])
def test_masked(device, kind, name, state):
    for density, offset in ((0.3, 0), (1.0, 3), (0.0, 0)):
        settings = settings_of(device, name)
        check(device, settings, density=density, offset=offset, state=state, exp_avg=name != "no exp_avg")


@pytest.mark.parametrize("name", ["plain", "no exp_avg", "everything"])
def test_differentiated(device, name):
    for density, offset in ((0.3, 0), (0.9, 3), (0.0, 0)):
        settings = settings_of(device, name)
        check(
            device, settings, rule="differentiated", density=density, offset=offset, exp_avg=name != "no exp_avg",
            has_grad=offset == 0,
        )  # fmt: skip


@pytest.mark.parametrize("rule", ["masked", "differentiated"])
def test_16_bits(device, kind, rule):
    for dtype, grad_dtype in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        check(device, with_settings(lr=0.5), density=0.3, rule=rule, dtype=dtype, grad_dtype=grad_dtype, master=True)


@pytest.mark.parametrize("rule", ["masked", "differentiated"])
def test_norm_and_finite_check(device, kind, rule):
    """In the interpreter the sums are of one order; on a GPU that is the compiler's choice."""
    found = []
    settings = with_settings(clip_norm=0.1, clip_value=1.0)
    for compact in (False, True):
        rig = Rig(device, SHAPES, settings, density=0.3, rule=rule, one_sign=True, compact_grads=compact)
        rig.step()
        rig.check()
        jobs, _ = rig.jobs()
        found.append(gradstats.gradstats(jobs, settings, rig.cache))
        if compact:
            grad = jobs[1].grad if rule == "masked" else jobs[1].masked_grad
            grad[-1] = float("inf")
            assert gradstats.gradstats(jobs, settings, rig.cache)[1] == 1
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_gates_fail_on_a_neighbours_gradient(device, kind, monkeypatch):
    def neighbours(jobs, settings, cache):
        for job in jobs:
            job.grad = job.grad.roll(1) if job.is_compact(job.grad) else job.grad
        adam.step(jobs, settings, cache)

    with pytest.raises(AssertionError, match="values too far"):
        check(device, with_settings(), density=0.3, broken=neighbours)
    real = adam_lanes.ranked_table

    def late(bits, n):
        table = real(bits, n)
        table.chunks[:, 1] += 1
        return table

    monkeypatch.setattr(adam_plan, "ranked_table", late)
    with pytest.raises(AssertionError, match="values too far"):
        check(device, with_settings(), density=0.3, rule="differentiated")


def test_the_optimizer_keeps_its_tables_while_kinds_take_turns(device, monkeypatch):
    built, real = [], adam_lanes.masked_table
    monkeypatch.setattr(adam_plan, "masked_table", lambda bits, n: (built.append(n), real(bits, n))[1])
    shapes = {"a": (9, 20), "b": (70,)}
    made = [
        {name: torch.nn.Parameter(torch.ones(shape, device=device)) for name, shape in shapes.items()} for _ in "12"
    ]
    mask = pk.SaliencyMask.random(made[0].items(), 0.3)
    optimizers = [pk.MaskedAdam(params.items(), mask, impl="triton", ema=0.9) for params in made]
    for i, (rule, compact) in enumerate([("masked", True), ("masked", False), ("masked", True), ("both", True)] * 2):
        random = torch.Generator().manual_seed(i)
        grads = {name: torch.randn(shape, generator=random).to(device) for name, shape in shapes.items()}
        for hand_over, params, optimizer in zip((compact, False), made, optimizers):
            given = {name: g[mask.bool(name)] for name, g in grads.items()} if hand_over else grads
            for p in params.values():
                p.grad = torch.ones_like(p) if rule == "both" else None
            optimizer.step(given) if rule == "both" else optimizer.step(compact_grads=given)
        assert bool(built) == (i in (0, 4)), "lists of lanes were made anew"  # 4: the state has become dense
        built.clear()
        for name in shapes:
            assert torch.equal(made[0][name], made[1][name])
            for key, value in optimizers[0].state[made[0][name]].items():
                assert torch.equal(value, optimizers[1].state[made[1][name]][key])


def test_what_does_not_fit_is_refused(device):
    for rule in ("masked", "differentiated"):
        rig = Rig(device, [(40,)], density=0.5, rule=rule, compact_grads=True)
        (job,), _ = rig.jobs()
        which = "grad" if rule == "masked" else "masked_grad"
        setattr(job, which, getattr(job, which)[1:])
        with pytest.raises(adam.PeckerKernelsError, match="a compact gradient of"):
            adam.step([job], rig.settings, {})
