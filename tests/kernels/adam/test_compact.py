"""Compact gradients: the step on dense gradients of the same values, to the bit, in every implementation."""

import itertools
import weakref

import pecker_kernels as pk
import pytest
import torch
from pecker_kernels.adam import cpu as cpu_adam
from pecker_kernels.adam import step as adam_step
from pecker_kernels.mask import bits as bitmask

SHAPES = {"matrix": (70, 130), "kernel": (9, 3, 3, 3), "vector": (301,), "scalar": ()}
SETTINGS = {
    "plain": {},
    "clipped, L2, average": {"weight_decay": 0.1, "clip_value": 0.5, "clip_norm": 0.1, "ema": 0.9},
    "no exp_avg, decoupled": {"betas": (0.0, 0.99), "weight_decay": 0.1, "decoupled_weight_decay": True},
    "dense state, norm": {"state": "dense", "clip_norm": 0.1, "ema": 0.3},
    "scaled, checked": {"check_finite": True, "clip_value": 0.5},
}
MASKS = [("element", 0.02), ("element", 0.4), ("element", 0.97), ("row", 0.1), ("row", 0.6), ("tile", 0.3)]
DTYPES = [  # weights, their master, gradients
    (torch.float32, None, torch.float32),
    (torch.float32, None, torch.bfloat16),
    (torch.float32, None, torch.float16),
    (torch.bfloat16, None, torch.bfloat16),
    (torch.bfloat16, "fp32", torch.float32),
    (torch.float16, "fp32", torch.float16),
    (torch.float64, None, torch.float64),
    (torch.float64, None, torch.float32),
]


@pytest.fixture(params=["reference", "auto"])
def torch_path(request, monkeypatch):
    """The steps in torch operations; "auto" comes to them where no kernel can serve."""
    monkeypatch.setattr(adam_step, "_refusal", lambda which, jobs: "is not asked here")
    return request.param


def normal(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def guarded(values, offset=3):
    """The same in the midst of NaN."""
    whole = values.new_full((values.numel() + 64,), float("nan"))
    return whole[offset : offset + values.numel()].copy_(values)


def compacted(grads, mask):
    """As kept values; every other weight's gradient is lost."""
    return {name: guarded(g[mask.bool(name)].reshape(-1)) for name, g in grads.items()}


def poisoned(grads, mask):
    """Dense, NaN where nobody may look."""
    return {name: torch.where(mask.bool(name), g, float("nan")) for name, g in grads.items()}


def make(mask, dtype=torch.float32, **settings):
    params = {name: torch.nn.Parameter(w) for name, w in normal(0, dtype).items()}
    return params, pk.MaskedAdam(params.items(), mask, lr=0.05, seed=3, **settings)


def mask_of(structure, density):
    return pk.SaliencyMask.random(normal(0).items(), density, structure=structure, tile=(16, 32))


def take(params, optimizer, mask, rule, i, compact, grad_dtype):
    """Step i under either rule."""
    dtype = params["matrix"].dtype
    hand_over = compacted if compact else poisoned
    given = hand_over(normal(2 * i + 1, grad_dtype), mask)
    for p in params.values():
        p.grad = None
    if rule == "differentiated":
        grads = normal(2 * i + 2, dtype)
        for name, p in params.items():
            p.grad = grads[name].clone()
        optimizer.step(given)
        assert all(torch.equal(p.grad, grads[name]) for name, p in params.items())
    elif compact or grad_dtype != dtype:  # which .grad may not have
        optimizer.step(compact_grads=given)
    else:
        for name, p in params.items():
            p.grad = given[name]
        optimizer.step()


def everything(params, optimizer):
    for name, p in params.items():
        yield name, p.detach()
        yield from ((f"{key} of {name}", value) for key, value in optimizer.state[p].items())


def check_same(one, other):
    for (what, a), (_, b) in zip(everything(*one), everything(*other), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), f"{what} is another"


def check(impl, structure, density, name, rule, dtypes=DTYPES[0]):
    dtype, master, grad_dtype = dtypes
    mask = mask_of(structure, density)
    made = []
    for compact in (False, True):
        params, optimizer = make(mask, dtype, impl=impl, master=master, **SETTINGS[name])
        if name.startswith("scaled"):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        for i in range(2):
            take(params, optimizer, mask, rule, i, compact, grad_dtype)
        made.append((params, optimizer))
    check_same(*made)
    assert any(
        bool(p.isfinite().all()) and not torch.equal(p, w) for p, w in zip(params.values(), normal(0, dtype).values())
    )


RULES = ["masked", "differentiated"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_kernels_of_every_level(level, name, rule):
    for structure, density in MASKS:
        check("cpu", structure, density, name, rule)


@pytest.mark.parametrize("rule", RULES)
def test_dtypes(level, rule):
    for dtypes, name in itertools.product(DTYPES, ("plain", "dense state, norm", "scaled, checked")):
        for structure, density in (("element", 0.4), ("row", 0.3)):
            check("cpu", structure, density, name, rule, dtypes)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_torch_operations(torch_path, name, rule):
    for structure, density in MASKS:
        check(torch_path, structure, density, name, rule)
    for dtypes in DTYPES[1:]:
        check(torch_path, "element", 0.4, name, rule, dtypes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gates_fail_on_other_gradients(impl, rule, monkeypatch):
    """A neighbour's value for each weight; and, in the kernels, the one behind the last that there is."""
    check(impl, "element", 0.4, "plain", rule)
    real = pk.MaskedAdam._fitting

    def neighbours(self, g, p, name, what):
        g = real(self, g, p, name, what)
        return g if g.shape == p.shape else g.roll(1)

    with monkeypatch.context() as patch:
        patch.setattr(pk.MaskedAdam, "_fitting", neighbours)
        with pytest.raises(AssertionError, match="is another"):
            check(impl, "element", 0.4, "plain", rule)
    if impl == "reference":
        return
    fill = cpu_adam._Table.fill

    def one_late(table, jobs, *same):
        held = fill(table, jobs, *same)
        column = cpu_adam._GRAD + (rule == "differentiated")
        table.rows[:, column] += 4 * table.rows[:, column - cpu_adam._GRAD + cpu_adam._GRAD_COMPACT]
        return held

    with monkeypatch.context() as patch:
        patch.setattr(cpu_adam._Table, "fill", one_late)
        with pytest.raises(AssertionError, match="is another"):
            check("cpu", "row", 0.6, "plain", rule)


def test_dense_and_compact_gradients_take_turns():
    mask = mask_of("element", 0.3)
    for kinds in ((True, False, True, True, False), (False, True, True)):
        made = [make(mask, betas=(0.9, 0.99), ema=0.9), make(mask, betas=(0.9, 0.99), ema=0.9)]
        for i, compact in enumerate(kinds):
            before = made[0][1]._plans.get(0)
            take(*made[0], mask, "masked", i, compact, torch.float32)
            take(*made[1], mask, "masked", i, False, torch.float32)
            check_same(*made)
            same = i > 0 and kinds[i - 1] == compact
            assert (made[0][1]._plans[0] is before) == same, "a plan is kept while the kinds of gradients stay"
        for i, compact in enumerate((True, False)):
            take(*made[0], mask, "differentiated", 9 + i, compact, torch.float32)
            take(*made[1], mask, "differentiated", 9 + i, False, torch.float32)
        take(*made[0], mask, "masked", 20, True, torch.float32)
        take(*made[1], mask, "masked", 20, False, torch.float32)
        check_same(*made)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_lists_with_gradients_of_every_kind(impl):
    """None leaves .grad in force, a dense entry stands in for it, and .grad itself may be listed."""
    mask = mask_of("row", 0.5)
    grads = normal(1)
    made = [make(mask, impl=impl) for _ in range(2)]
    for params, _ in made:
        params["vector"].grad, params["scalar"].grad = grads["vector"].clone(), grads["scalar"].clone()
    given = [compacted(grads, mask)["matrix"], grads["kernel"], None, made[0][0]["scalar"].grad]
    made[0][1].step(compact_grads=given)
    params, optimizer = made[1]
    for name in ("matrix", "kernel"):
        params[name].grad = grads[name].clone()
    optimizer.step()
    check_same(*made)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_all_or_none_of_a_tensor_and_values_that_lie_apart(impl, rule):
    bits = {name: bitmask.full_bits(g.numel()) for name, g in normal(0).items()}
    bits["kernel"] = torch.zeros_like(bits["kernel"])
    bits["vector"] = bitmask.pack_bits(torch.arange(301) % 3 == 0)
    mask = pk.SaliencyMask(bits, SHAPES)
    grads = normal(1)
    made = [make(mask, impl=impl) for _ in range(2)]
    given = compacted(grads, mask)
    assert [g.numel() for g in given.values()] == [70 * 130, 0, 101, 1]
    apart = given["vector"].new_full((202,), float("nan"))[::2]
    given["vector"] = apart.copy_(given["vector"])
    made[0][1].step(given) if rule == "differentiated" else made[0][1].step(compact_grads=given)
    dense = poisoned(grads, mask)
    made[1][1].step(dense) if rule == "differentiated" else made[1][1].step(compact_grads=dense)
    check_same(*made)


def test_weights_that_are_not_contiguous():
    mask = mask_of("element", 0.5)
    weight = normal(0)["kernel"].to(memory_format=torch.channels_last)
    made = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
    grads = normal(1)
    for p, given in zip(made, (compacted(grads, mask), grads)):
        pk.MaskedAdam([("kernel", p)], mask).step(compact_grads={"kernel": given["kernel"]})
    assert torch.equal(*made)
    assert not torch.equal(made[0], weight)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_given_back(rule):
    mask = mask_of("element", 0.3)
    params, optimizer = make(mask)
    for i in range(2):
        given = compacted(normal(i), mask)
        held = [weakref.ref(g) for g in given.values()]
        for p in params.values():
            p.grad = torch.zeros_like(p) if rule == "differentiated" else None
        optimizer.step(given) if rule == "differentiated" else optimizer.step(compact_grads=given)
        del given
        assert all(ref() is None for ref in held)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_what_is_not_finite_is_found(impl):
    mask = mask_of("element", 0.3)
    for settings, scaler in (({"check_finite": True}, False), ({}, True)):
        params, optimizer = make(mask, impl=impl, **settings)
        if scaler:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        for bad in (float("nan"), float("inf")):
            given = compacted(normal(1), mask)
            given["kernel"][-1] = bad
            optimizer.step(compact_grads=given)
            assert optimizer.skipped == 1
            assert all(torch.equal(p, w) for p, w in zip(params.values(), normal(0).values()))
            assert all(optimizer.state[p]["step"] == 0 for p in params.values())
        optimizer.step(compact_grads=compacted(normal(1), mask))
        assert optimizer.skipped == 0
        assert all(optimizer.state[p]["step"] == 1 for p in params.values())


def test_a_scaler_of_torch():
    mask = mask_of("element", 0.3)
    made = [make(mask), make(mask)]
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(torch.ones(()))
    grads = normal(1)
    for compact, (params, optimizer) in zip((True, False), made):
        params["vector"].grad = grads["vector"] * 16
        given = {name: g * 16 for name, g in grads.items() if name != "vector"}
        if compact:
            given = {name: g[mask.bool(name)].reshape(-1) for name, g in given.items()}
        scaler.step(optimizer, compact_grads=given)
    scaler.update()
    check_same(*made)
    params, plain = make(mask)
    plain.step(compact_grads=grads)
    check_same(made[0], (params, plain))


def test_what_does_not_fit_is_refused():
    mask = mask_of("element", 0.3)
    params, optimizer = make(mask)
    count = mask.count_of("matrix")
    good = torch.ones(count)

    def refuses(match, masked_grads=None, **kwargs):
        with pytest.raises(pk.PeckerKernelsError, match=match) as caught:
            optimizer.step(masked_grads, **kwargs)
        assert "\n" not in str(caught.value)

    for short in (good[1:], torch.ones(count + 1), torch.ones(70 * 130), torch.ones(1, count), torch.ones(130, 70)):
        for given in ({"compact_grads": {"matrix": short}}, {"masked_grads": {"matrix": short}}):
            what, shape = next(iter(given)), list(short.shape)
            refuses(
                rf"{what} of 'matrix' has shape \{shape}, the parameter \[70, 130\], \[{count}\] where compact", **given
            )
    refuses("compact_grads names 'other', which is no parameter", compact_grads={"other": good})
    refuses("compact_grads has 1 entries for 4 parameters", compact_grads=[good])
    refuses("compact_grads stand in for .grad", masked_grads={"matrix": good}, compact_grads={"matrix": good})
    refuses("'matrix' is on meta, the parameter on cpu", compact_grads={"matrix": good.to("meta")})
    params["matrix"].grad = torch.zeros(70, 130)
    refuses("names 'matrix', which has a .grad too", compact_grads={"matrix": good})
    params["matrix"].grad = None
    assert not optimizer.state[params["matrix"]]
    assert torch.equal(params["matrix"], normal(0)["matrix"])

    p = torch.nn.Parameter(torch.ones(4, 5))
    unmasked = pk.MaskedAdam([("p", p)])
    with pytest.raises(pk.PeckerKernelsError, match=r"of 'p' has shape \[20\], the parameter \[4, 5\]$"):
        unmasked.step(compact_grads={"p": torch.ones(20)})
    unmasked.step(compact_grads={"p": torch.ones(4, 5)})
    assert bool((p < 1).all())
