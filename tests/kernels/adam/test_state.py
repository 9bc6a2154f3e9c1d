"""MaskedAdam around the arithmetic: masks that change, files, other optimizers, 16-bit weights, refusals."""

import copy
import io
import itertools
import pickle

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import check_untouched, fill_grads, small_model, snapshot
from pecker_kernels import reference


def run(model, optimizer, start, stop):
    for i in range(start, stop):
        fill_grads(model, seed=i)
        optimizer.step()


def make(model, density=0.4, seed=0, **settings):
    mask = pk.SaliencyMask.random(model.named_parameters(), density, seed=seed) if density else None
    return pk.MaskedAdam(model.named_parameters(), mask, **{"lr": 1e-2, "betas": (0.9, 0.99), **settings})


def check_equal(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


VARIANTS = [
    {},
    {"betas": (0.0, 0.999)},
    {"state": "dense", "ema": 0.9, "weight_decay": 0.1},
    {"ema": 0.9, "clip_value": 0.1, "clip_norm": 1.0},
    {"density": None, "ema": 0.5},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_round_trips_continue_the_same_run(settings, how):
    straight = small_model()
    a = make(straight, **settings)
    run(straight, a, 0, 6)
    model = small_model()
    b = make(model, **settings)
    run(model, b, 0, 3)
    if how in ("state_dict", "torch.save"):
        saved = b.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        twin = small_model()
        twin.load_state_dict(model.state_dict())
        # Every setting but the mask comes back from the file.
        c = pk.MaskedAdam(twin.named_parameters(), b.mask)
        c.load_state_dict(saved)
        run(twin, c, 3, 6)
        assert c.param_groups[0]["betas"] == a.param_groups[0]["betas"]
    elif how == "deepcopy":
        twin, c = copy.deepcopy((model, b))
        before = snapshot(model)
        run(twin, c, 3, 6)
        check_equal(model, type("M", (), {"parameters": lambda self: before.values()})())
    else:
        twin, c = pickle.loads(pickle.dumps((model, b)))
        run(twin, c, 3, 6)
    check_equal(straight, twin)
    for x, y in zip(a.ema_weights().values(), c.ema_weights().values()):
        assert torch.equal(x, y)


def test_compact_state_is_as_small_as_promised():
    model = small_model()
    optimizer = make(model, density=0.1, betas=(0.0, 0.999))
    run(model, optimizer, 0, 1)
    held = sum(s["exp_avg_sq"].numel() for s in optimizer.state.values())
    assert held == optimizer.mask.count - optimizer.mask.count_of("unused")
    assert all(set(s) == {"step", "exp_avg_sq"} for s in optimizer.state.values())
    for name, p in model.named_parameters():
        if p in optimizer.state:
            assert optimizer.state[p]["exp_avg_sq"].shape == (optimizer.mask.count_of(name),)


@pytest.mark.parametrize("settings", [{}, {"state": "dense"}, {"ema": 0.9, "betas": (0.0, 0.99)}], ids=str)
def test_set_mask_carries_lanes_that_stay(settings):
    model = small_model()
    optimizer = make(model, **settings)
    run(model, optimizer, 0, 3)
    old, dense = optimizer.mask, optimizer.densify()["state"]
    new = pk.SaliencyMask.random(model.named_parameters(), 0.5, seed=1)
    optimizer.set_mask(new)
    again = optimizer.densify()["state"]
    for i, (name, _) in enumerate(model.named_parameters()):
        if i not in dense:
            continue
        stay = old.bool(name) & new.bool(name)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again[i][key][stay], dense[i][key][stay])
            assert not again[i][key][~stay & new.bool(name)].any()
            if settings.get("state") == "dense":
                assert torch.equal(again[i][key], dense[i][key])
        assert int(again[i]["step"]) == 3
    before = snapshot(model)
    run(model, optimizer, 3, 5)
    check_untouched(model, before, new)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.set_mask(None)
    run(model, optimizer, 5, 6)
    optimizer.set_mask(old)
    run(model, optimizer, 6, 7)
    assert optimizer.state[model[2].weight]["exp_avg_sq"].dim() == (2 if settings.get("state") == "dense" else 1)


def test_the_same_mask_again_changes_nothing():
    models = [small_model(), small_model()]
    for i, model in enumerate(models):
        optimizer = make(model, ema=0.9)
        run(model, optimizer, 0, 2)
        if i:
            optimizer.set_mask(optimizer.mask)
        run(model, optimizer, 2, 4)
    check_equal(*models)


def test_gate_fails_when_moments_are_not_carried(monkeypatch):
    def forget(self, new_mask):
        self._mask, self._lanes = new_mask, {}
        self.state.clear()

    monkeypatch.setattr(pk.MaskedAdam, "set_mask", forget)
    with pytest.raises(AssertionError):
        test_the_same_mask_again_changes_nothing()


def test_set_mask_refuses_a_foreign_mask_and_stays_usable():
    model = small_model()
    optimizer = make(model)
    run(model, optimizer, 0, 1)
    before = optimizer.mask
    with pytest.raises(pk.MaskError, match="not in the mask"):
        optimizer.set_mask(pk.SaliencyMask.full({"other": torch.ones(3)}))
    assert optimizer.mask is before
    run(model, optimizer, 1, 2)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_densify_goes_on_in_torch(settings):
    model = small_model()
    optimizer = make(model, **{**settings, "ema": None, "clip_value": None, "clip_norm": None})
    run(model, optimizer, 0, 3)
    theirs = torch.optim.Adam(model.named_parameters(), fused=True)
    theirs.load_state_dict(optimizer.densify())
    theirs.param_groups[0]["fused"] = True
    twin = copy.deepcopy(model)
    ours = pk.MaskedAdam(twin.named_parameters(), None)
    ours.load_state_dict(optimizer.densify())
    run(model, theirs, 3, 5)
    run(twin, ours, 3, 5)
    check_equal(model, twin)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adopt_carries_settings_and_moments(named, kind):
    model, twin = small_model(), small_model()
    theirs = kind(model.named_parameters() if named else model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6)
    other = kind(twin.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6)
    run(model, theirs, 0, 3)
    run(twin, other, 0, 3)
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.5)
    ours = pk.adopt(theirs, mask, clip_value=1e9)
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"], group["clip_value"]) == (1e-2, 0.1, 1e-6, 1e9)
    assert group["decoupled_weight_decay"] is (kind is torch.optim.AdamW)
    before = snapshot(model)
    run(model, ours, 3, 5)
    run(twin, other, 3, 5)
    check_untouched(model, before, mask)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        keep = mask.bool(name)
        torch.testing.assert_close(p[keep], q[keep], rtol=1e-5, atol=1e-7)
    assert pk.adopt(theirs, mask, lr=3.0).param_groups[0]["lr"] == 3.0


def test_adopt_keeps_groups_and_refuses_what_it_cannot_carry():
    model = small_model()
    named = list(model.named_parameters())
    theirs = torch.optim.Adam([{"params": named[:2], "lr": 0.5}, {"params": named[2:], "betas": (0.0, 0.9)}])
    run(model, theirs, 0, 1)
    mask = pk.SaliencyMask.full(named)
    ours = pk.adopt(theirs, mask)
    assert [g["lr"] for g in ours.param_groups] == [0.5, 1e-3]
    assert "exp_avg" not in ours.state[named[2][1]]
    with pytest.raises(pk.MaskError, match="order and shape"):
        pk.adopt(torch.optim.Adam(list(model.parameters())[::-1]), mask)
    with pytest.raises(pk.PeckerKernelsError, match="takes a torch"):
        pk.adopt(torch.optim.SGD(model.parameters(), lr=0.1), mask)
    with pytest.raises(pk.PeckerKernelsError, match="amsgrad"):
        pk.adopt(torch.optim.Adam(model.parameters(), amsgrad=True), mask)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -1.0},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_torchs_words(bad):
    with pytest.raises(ValueError, match="Invalid") as theirs:
        torch.optim.Adam(small_model().parameters(), **bad)
    with pytest.raises(pk.PeckerKernelsError) as ours:
        pk.MaskedAdam(small_model().named_parameters(), **bad)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"betas": (0, 0.999)}, "both floats"),
        ({"lr": torch.ones(2)}, "1-element"),
        ({"clip_value": 0.0}, "clip_value"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"ema": 1.5}, "ema"),
        ({"master": "fp16"}, "master"),
        ({"state": "sparse"}, "state"),
        ({"seed": -1}, "seed"),
        ({"impl": "triton"}, "impl='triton'"),
        ({"check_finite": 1}, "check_finite"),
        ({"impl": "quick"}, "unknown implementation"),
    ],
    ids=str,
)
def test_more_bad_arguments(bad, message):
    with pytest.raises(pk.PeckerKernelsError, match=message):
        pk.MaskedAdam(small_model().named_parameters(), **bad)


def test_a_mask_needs_names_that_fit():
    model = small_model()
    mask = pk.SaliencyMask.full(model.named_parameters())
    with pytest.raises(pk.PeckerKernelsError, match="named_parameters"):
        pk.MaskedAdam(model.parameters(), mask)
    with pytest.raises(pk.MaskError, match="'extra' is not in the mask"):
        pk.MaskedAdam([*model.named_parameters(), ("extra", torch.nn.Parameter(torch.ones(2)))], mask)
    model.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(pk.MaskError, match="'scale' has shape"):
        pk.MaskedAdam(model.named_parameters(), mask)
    with pytest.raises(ValueError, match="empty parameter list"):
        pk.MaskedAdam([])


def test_param_groups_schedulers_closures_and_skipped_gradients():
    model, twin = small_model(), small_model()
    named = list(model.named_parameters())
    mask = pk.SaliencyMask.full(named)
    ours = pk.MaskedAdam(named[:3], mask, lr=0.1)
    theirs = torch.optim.Adam(list(twin.parameters())[:3], lr=0.1, fused=True)
    ours.add_param_group({"params": named[3:], "lr": 0.01})
    theirs.add_param_group({"params": list(twin.parameters())[3:], "lr": 0.01})
    with pytest.raises(pk.MaskError, match="'x'"):
        ours.add_param_group({"params": [("x", torch.nn.Parameter(torch.ones(2)))]})
    assert len(ours.param_groups) == 2
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (ours, theirs)]
    for i in range(3):
        for m, o, s in ((model, ours, schedules[0]), (twin, theirs, schedules[1])):
            fill_grads(m, seed=i)
            if i == 1:
                m[0].weight.grad = None
            assert o.step(lambda: torch.tensor(5.0)) == 5.0
            s.step()
    check_equal(model, twin)
    assert ours.param_groups[1]["lr"] == 0.00125
    assert int(ours.state[model[0].weight]["step"]) == 2
    assert model.unused not in ours.state


def test_state_of_another_mask_or_optimizer_is_refused():
    model = small_model()
    optimizer = make(model)
    run(model, optimizer, 0, 1)
    saved = optimizer.state_dict()
    with pytest.raises(pk.MaskError, match="another mask"):
        make(model, seed=5).load_state_dict(saved)
    with pytest.raises(pk.MaskError, match="another mask"):
        make(model, density=None).load_state_dict(saved)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(model, sgd, 0, 1)
    with pytest.raises(ValueError, match=r"not Adam's|maximize"):
        make(model).load_state_dict(sgd.state_dict())
    broken = copy.deepcopy(saved)
    broken["param_groups"][0]["lr"] = -1.0
    with pytest.raises(pk.PeckerKernelsError, match="learning rate"):
        optimizer.load_state_dict(broken)
    saved["param_groups"][0]["betas"] = (0.0, 0.9)
    fresh = make(model)
    fresh.load_state_dict(saved)
    fresh.param_groups[0]["betas"] = (0.9, 0.9)
    with pytest.raises(pk.PeckerKernelsError, match="no exp_avg"):
        run(model, fresh, 0, 1)


def test_dense_moments_of_the_differentiated_rule_survive_a_new_mask():
    model = small_model()
    optimizer = make(model)
    fill_grads(model, seed=0)
    optimizer.step(masked_grads=fill_grads(model, seed=1))
    before = copy.deepcopy(optimizer.densify()["state"])
    twin = make(model)
    twin.load_state_dict(optimizer.state_dict())
    for o in (optimizer, twin):
        o.set_mask(pk.SaliencyMask.random(model.named_parameters(), 0.2, seed=8))
        after = o.densify()["state"]
        assert all(torch.equal(after[i][k], before[i][k]) for i in before for k in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("state", ["compact", "dense"])
def test_fp32_master_is_the_fp32_run(dtype, density, state):
    half, full = small_model(dtype=dtype), small_model(dtype=dtype).float()
    a, b = make(half, density, master="fp32", state=state, ema=0.9), make(full, density, state=state, ema=0.9)
    before = snapshot(half)
    for i in range(4):
        for name, g in fill_grads(half, seed=i).items():
            dict(full.named_parameters())[name].grad = g.float()
        a.step()
        b.step()
        if i == 1:
            for o in (a, b):
                saved, o.state = copy.deepcopy(o.state_dict()), type(o.state)(dict)
                o.load_state_dict(saved)
    for (name, p), q in zip(half.named_parameters(), full.parameters()):
        assert torch.equal(p, q.to(dtype)), name
        if p in a.state:
            assert a.state[p]["exp_avg_sq"].dtype == torch.float32
    for x, y in zip(a.ema_weights().values(), b.ema_weights().values()):
        assert torch.equal(x, y)
    if density:
        check_untouched(half, before, a.mask)


def test_float16_without_a_master_is_refused():
    with pytest.raises(pk.PeckerKernelsError, match="master='fp32'"):
        make(small_model(dtype=torch.float16))


def test_stochastic_rounding_is_unbiased_and_a_function_of_seed_step_and_position():
    value = torch.full((200_000,), 1.0 + 2**-9)  # a quarter of the way from 1 to its neighbour in bfloat16
    index = torch.arange(200_000)
    bits = reference.random_bits16(index, seed=3, step=7)
    rounded = reference.stochastic_round_bf16(value, bits).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float((rounded > 1).float().mean()) - 0.25) < 0.005
    assert torch.equal(bits[500:600], reference.random_bits16(index[500:600], 3, 7))
    for other in (reference.random_bits16(index, 4, 7), reference.random_bits16(index, 3, 8)):
        assert abs(float((other == bits).float().mean())) < 1e-3
        assert abs(float(torch.corrcoef(torch.stack([bits, other]).double())[0, 1])) < 0.01
    exact = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan")])
    for draw in (0, 65535):
        out = reference.stochastic_round_bf16(exact, torch.full((6,), draw))
        assert torch.equal(out.view(torch.int16), exact.to(torch.bfloat16).view(torch.int16))


def test_bf16_weights_move_by_steps_below_their_resolution():
    p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    mask = pk.SaliencyMask.random({"p": p}, 0.5)
    optimizer = pk.MaskedAdam([("p", p)], mask, lr=1e-4, betas=(0.0, 0.999), seed=1)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    keep = mask.bool("p")
    assert bool((p[~keep] == 1).all())
    # Rounding to nearest would leave 1.0 for ever; on average the ten steps arrive.
    assert abs(float(p.detach()[keep].float().mean()) - (1 - 1e-3)) < 1e-4


def test_a_compiled_training_step_is_the_eager_one():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
        mask = pk.SaliencyMask.random(model.named_parameters(), 0.4)
        return model, pk.MaskedAdam(model.named_parameters(), mask, lr=0.1)

    def train(model, optimizer, x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    (eager, a), (compiled, b) = make(), make()
    compiled_train = torch.compile(train, backend="eager")
    for i in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        train(eager, a, x)
        compiled_train(compiled, b, x)
    assert all(torch.equal(p, q) for p, q in zip(eager.parameters(), compiled.parameters()))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_step_on_gradients_that_are_not_finite_is_skipped(impl, masked):
    model = small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.4) if masked else None
    groups = [{"params": [pair]} for pair in model.named_parameters()]
    optimizer = pk.MaskedAdam(groups, mask, impl=impl, check_finite=True, ema=0.9)
    fill_grads(model, seed=0)
    optimizer.step()
    assert float(optimizer.skipped) == 0
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    grads = fill_grads(model, seed=1)
    weight = model[0].weight
    keep = mask.bool("0.weight") if masked else torch.ones_like(weight, dtype=torch.bool)
    weight.grad[keep.nonzero(as_tuple=True)[0][:1], keep.nonzero(as_tuple=True)[1][:1],
                keep.nonzero(as_tuple=True)[2][:1], keep.nonzero(as_tuple=True)[3][:1]] = float("nan")  # fmt: skip
    optimizer.step()
    assert float(optimizer.skipped) == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for i, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][key]) for key, value in values.items())
    if masked:
        weight.grad = grads["0.weight"].clone()
        weight.grad[~keep] = float("inf")  # never read
    else:
        weight.grad = grads["0.weight"]
    optimizer.step()
    assert float(optimizer.skipped) == 0
    assert float(optimizer.state[weight]["step"]) == 2


def test_grad_scaler_unscales_and_skips():
    results = []
    for scale in (None, 1024.0):
        model = small_model()
        mask = pk.SaliencyMask.random(model.named_parameters(), 0.4)
        optimizer = pk.MaskedAdam(model.named_parameters(), mask, lr=0.1, clip_value=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for i in range(3):
            fill_grads(model, seed=i)
            for p in model.parameters():
                if p.grad is not None and scale is not None:
                    p.grad *= scale
            scaler.scale(torch.zeros(()))  # makes the scale's tensor
            if i == 1:
                model[0].bias.grad.fill_(float("inf"))
            if i != 1 or scale is not None:
                scaler.step(optimizer)
            scaler.update(scale)
        results.append(snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


def test_jobs_are_taken_up_again_and_made_anew_when_state_changes():
    model = small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.4)
    optimizer = pk.MaskedAdam(model.named_parameters(), mask, betas=(0.0, 0.9))
    plans = []
    for i in range(8):
        fill_grads(model, seed=i)
        if i == 2:
            optimizer.param_groups[0]["ema"] = 0.5
        if i == 4:
            optimizer.set_mask(pk.SaliencyMask.random(model.named_parameters(), 0.4, seed=1))
        if i == 6:
            p = model[0].weight
            optimizer.state[p]["exp_avg_sq"] = torch.full_like(optimizer.state[p]["exp_avg_sq"], 7.0)
        optimizer.step()
        plans.append(optimizer._plans[0])
    same = [a is b for a, b in itertools.pairwise(plans)]
    assert same == [True, False, True, False, True, False, True]
    assert float(optimizer.state[model[0].weight]["exp_avg_sq"].min()) > 5
