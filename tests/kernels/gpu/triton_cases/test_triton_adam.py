"""The Triton Adam step against reference.adam_: accuracy of every variant, and the lanes it must not touch."""

from dataclasses import replace

import pytest
import torch
from adam_rig import Rig, with_settings
from pecker_kernels import reference
from pecker_kernels.gpu import adam, adam_lanes, adam_plan

SHAPES = [(300,), (5, 13), (7,), (), (0, 3), (1, 64)]
KINDS = {"bitmap": 0.0, "index": 2.0}
STEPS = 2


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Every masked tensor as a bitmap, or as lists."""
    monkeypatch.setattr(adam_lanes, "INDEX_BELOW", KINDS[request.param])
    return request.param


def check(rig, steps=STEPS):
    for _ in range(steps):
        rig.step()
        rig.check()
    return rig


def kinds_of(rig):
    (plan,) = (plan for key, plan in rig.cache.items() if key[0] == "plan")
    return {variant.kind for variant, _, _ in plan.launches}


BETAS = [{"beta1": 0.9}, {"beta1": 0.4, "beta2": 0.95, "eps": 1e-6}, {"beta1": 0.0}]


@pytest.mark.parametrize("settings", BETAS, ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_dense(device, settings, offset):
    rig = Rig(device, SHAPES, with_settings(**settings), exp_avg=settings["beta1"] != 0, offset=offset)
    assert kinds_of(check(rig, steps=4)) == {adam_lanes.WHOLE.value}


@pytest.mark.parametrize("settings", BETAS, ids=str)
@pytest.mark.parametrize("state", ["compact", "dense"])
def test_masked(device, kind, settings, state):
    rig = Rig(device, SHAPES, with_settings(**settings), density=0.3, state=state, exp_avg=settings["beta1"] != 0)
    assert getattr(adam_lanes, kind.upper()).value in kinds_of(check(rig, steps=4))


@pytest.mark.parametrize("offset", [0, 4, 5])
@pytest.mark.parametrize("settings", [{"beta1": 0.9}, {"beta1": 0.0, "grad_scale": 8.0}], ids=str)
def test_differentiated(device, offset, settings):
    if "grad_scale" in settings:
        settings = {**settings, "grad_scale": torch.tensor(8.0, device=device)}
    rig = Rig(device, SHAPES, with_settings(**settings), density=0.3, rule="differentiated", offset=offset)
    assert kinds_of(check(rig)) == {adam_lanes.WHOLE.value}


@pytest.mark.parametrize("state", ["compact", "dense"])
def test_two_gradients_under_a_mask(device, kind, state):
    check(Rig(device, SHAPES, density=0.3, rule="both", state=state))


def test_masked_gradient_alone(device):
    check(Rig(device, SHAPES, rule="differentiated", density=0.3, has_grad=False))
    check(Rig(device, SHAPES, rule="differentiated", has_grad=False))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1023, 1024, 1025])
@pytest.mark.parametrize("density", [None, 0.5, 1.0])
def test_ragged_sizes(device, n, density):
    check(Rig(device, [(n,)], density=density), steps=1)


@pytest.mark.parametrize("n", [1, 9, 1025])
def test_ragged_lists(device, monkeypatch, n):
    monkeypatch.setattr(adam_lanes, "INDEX_BELOW", 2.0)
    check(Rig(device, [(n,), (n + 1,)], density=0.5, offset=1), steps=1)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_weight_decay(device, kind, density, decoupled, beta1):
    # Steps of the weights' own size, so that an error in either shows.
    settings = with_settings(beta1=beta1, lr=0.5, weight_decay=0.1, decoupled_weight_decay=decoupled)
    check(Rig(device, SHAPES, settings, density=density, zero=False), steps=1)
    check(Rig(device, SHAPES, settings, density=density))


CLIPS = [{"clip_value": 1e-2}, {"clip_norm": 1e-1}, {"clip_norm": 1e9}, {"clip_value": 1.0, "clip_norm": 0.5}]


@pytest.mark.parametrize("clips", CLIPS, ids=str)
@pytest.mark.parametrize("rule", ["dense", "masked", "differentiated"])
def test_clipping_and_scaling(device, kind, clips, rule):
    settings = with_settings(**clips, grad_scale=torch.tensor(64.0, device=device))
    kwargs = {"rule": "masked"} if rule == "dense" else {"rule": rule, "density": 0.3}
    check(Rig(device, SHAPES, settings, one_sign="clip_norm" in clips, **kwargs), steps=2)


def test_a_norm_below_the_limit_changes_nothing(device):
    results = []
    for clip_norm in (7.5, None):  # 1.5 times the norm
        job = Rig(device, [(2,)]).jobs()[0][0]
        job.grad.copy_(torch.tensor([3.0, -4.0]))
        adam.step([job], with_settings(clip_norm=clip_norm), {})
        results.append(job.exp_avg.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_ema(device, kind, density, decay):
    check(Rig(device, SHAPES, with_settings(ema=decay, lr=0.5), density=density))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("state", ["whole", "compact", "dense"])
def test_master_weights(device, kind, dtype, grad_dtype, state):
    density = None if state == "whole" else 0.3
    settings = with_settings(ema=0.9, lr=0.5)
    check(Rig(device, SHAPES, settings, density=density, state=state, dtype=dtype, grad_dtype=grad_dtype, master=True))


def test_everything_at_once(device, kind):
    scale = torch.tensor(4.0, device=device)
    settings = with_settings(
        beta1=0.9, lr=0.5, weight_decay=0.1, clip_value=1.0, clip_norm=0.1, ema=0.9, grad_scale=scale
    )
    for rule in ("masked", "differentiated"):
        rig = Rig(device, SHAPES, settings, density=0.3, rule=rule, dtype=torch.bfloat16, master=True, one_sign=True)
        check(rig, steps=2)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_on_the_device(device, density, dtype):
    check(Rig(device, SHAPES, with_settings(lr=torch.tensor(1e-3, dtype=dtype, device=device)), density=density))


@pytest.mark.parametrize("density", [None, 0.3])
def test_nothing_is_written_where_an_overflow_was_found(device, kind, density):
    found_inf = torch.zeros((), device=device)
    rig = Rig(device, SHAPES, with_settings(found_inf=found_inf, ema=0.9), density=density, zero=False)
    rig.step()
    for bad in (1.0, float("nan")):
        found_inf.fill_(bad)
        before = [{name: t.buffer.clone() for name, t in one.tensors.items()} for one in rig.ones]
        jobs, _ = rig.jobs()
        adam.step(jobs, rig.settings, rig.cache)
        for one, then in zip(rig.ones, before):
            for name, t in one.tensors.items():
                assert torch.equal(t.buffer.view(torch.uint8), then[name].view(torch.uint8)), f"{name} was written"


def test_one_launch_per_kind(device, kind):
    shapes = [(33,), (70, 3), (129,), (5,)] * 2
    rig = check(Rig(device, shapes, density=0.3), steps=1)
    (plan,) = rig.cache.values()
    assert len(plan.launches) == 1


def test_dead_chunks_cost_nothing(device):
    keep = torch.zeros(100 * adam_lanes.BLOCK, dtype=torch.bool)
    keep[7 * adam_lanes.BLOCK : 8 * adam_lanes.BLOCK - 1] = True
    table = adam_lanes.masked_table(reference.pack_bits(keep).to(device), keep.numel())
    assert table.kind == adam_lanes.BITMAP.value
    assert table.chunks.tolist() == [[7 * adam_lanes.BLOCK, 0, adam_lanes.BLOCK]]


def late(jobs, settings, cache):
    adam.step([replace(job, step=job.step + 1) for job in jobs], settings, cache)


def idle(jobs, settings, cache):
    pass


def forgets_first_moment(jobs, settings, cache):
    adam.step([replace(job, exp_avg=job.exp_avg.clone()) for job in jobs], settings, cache)


def clips_each_alone(jobs, settings, cache):
    for job in jobs:
        adam.step([job], settings, cache)


@pytest.mark.parametrize("broken", [late, idle, forgets_first_moment, clips_each_alone])
@pytest.mark.parametrize("density", [None, 0.3])
def test_gates_fail_on_a_broken_step(device, broken, density):
    with pytest.raises(AssertionError, match="values too far"):
        check(Rig(device, SHAPES, with_settings(clip_norm=0.1), density=density, one_sign=True, step=broken), steps=2)


@pytest.mark.parametrize("state", ["compact", "dense"])
def test_gates_fail_where_the_mask_is_ignored(device, monkeypatch, state):
    monkeypatch.setattr(adam_plan, "masked_table", lambda bits, n: adam_lanes.whole_table(n, bits.device))
    if state == "dense":
        with pytest.raises(AssertionError, match="was written outside the mask"):
            check(Rig(device, SHAPES, density=0.3, state=state), steps=1)
    else:
        with pytest.raises(adam.PeckerKernelsError, match="compact state of"):
            check(Rig(device, SHAPES, density=0.3, state=state), steps=1)


def test_gates_fail_where_neighbours_are_written(device, monkeypatch):
    """Ranks that start one late write behind the last lane."""
    real = adam_lanes.masked_table

    def shifted(bits, n):
        table = real(bits, n)
        table.chunks[:, 1] += 1
        return table

    monkeypatch.setattr(adam_plan, "masked_table", shifted)
    with pytest.raises(AssertionError, match=r"values too far|written behind"):
        check(Rig(device, [(100,)], density=0.5), steps=1)
