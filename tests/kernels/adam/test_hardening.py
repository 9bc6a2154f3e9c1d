"""What happens around a step: tensors that moved, state that does not fit, masks that change, gradients let go."""

import copy
import math
import threading
import weakref

import pecker_kernels as pk
import pytest
import torch
from pecker_kernels import native, reference
from pecker_kernels.adam import cpu
from pecker_kernels.mask import bits as bitmask
from pecker_kernels.torch_library import adam as ops


def made(shapes, keep=0.5, **settings):
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    mask = pk.SaliencyMask.random(params, keep) if keep else None
    for p in params.values():
        p.grad = torch.randn(p.shape)
    return params, mask, pk.MaskedAdam(params.items(), mask, **settings)


def test_bits_with_ones_in_the_padding_are_refused():
    p, g, v = torch.zeros(5), torch.ones(5), torch.zeros(8)
    with pytest.raises(pk.MaskError, match="padding"):
        ops.masked_adam_([p], [g], [torch.tensor([255], dtype=torch.uint8)], [], [v], 1, beta1=0.0)
    with pytest.raises(pk.MaskError, match="padding"):
        torch.ops.pecker.clip_norm_factor([g], [torch.tensor([255], dtype=torch.uint8)], 1.0)
    assert not p.any()


def test_strided_bits_say_the_same_as_their_copy():
    keep = torch.rand(800) < 0.3
    raw = torch.full((200,), 255, dtype=torch.uint8)
    raw[::2] = reference.pack_bits(keep)
    params, _, _ = made({"p": (800,)})
    mask = pk.SaliencyMask({"p": raw[::2]}, {"p": (800,)})
    before = params["p"].detach().clone()
    pk.MaskedAdam(params.items(), mask).step()
    assert torch.equal(params["p"].detach() != before, keep)


@pytest.mark.parametrize(
    "change", [lambda t: t.t(), lambda t: t[:3], lambda t: t.clone()], ids=["turned", "cut", "moved"]
)
def test_weights_replaced_between_steps(change):
    params, mask, optimizer = made({"p": (8, 8)})
    optimizer.step()
    p = params["p"]
    whole = p.detach().clone()
    p.data = change(p.data)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    if p.shape != (8, 8):
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
        assert torch.equal(p.detach(), before)
        return
    optimizer.step()
    moved = p.detach() != before
    assert torch.equal(moved, mask.bool("p"))
    assert whole.shape == p.shape


def test_a_counter_whose_storage_is_replaced():
    params, _, optimizer = made({"p": (9,)})
    optimizer.step()
    step = optimizer.state[params["p"]]["step"]
    step.data = torch.tensor(100.0)
    optimizer.step()
    assert float(step) == 101
    step.share_memory_()
    optimizer.step()
    assert float(step) == 102


@pytest.mark.parametrize("key", ["exp_avg", "ema"])
def test_damaged_state_is_refused(key):
    params, mask, optimizer = made({"p": (64,)}, keep=None, ema=0.9)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = torch.zeros(1)
    fresh = pk.MaskedAdam(params.items(), mask, ema=0.9)
    with pytest.raises(pk.PeckerKernelsError, match="'p' is damaged"):
        fresh.load_state_dict(saved)
    optimizer.state[params["p"]][key] = torch.zeros(1)
    with pytest.raises((pk.PeckerKernelsError, RuntimeError)):
        optimizer.step()


def test_state_of_parameters_in_another_order_is_refused_and_other_names_are_not_taken_over():
    params, mask, optimizer = made({"a": (8,), "b": (8,)})
    optimizer.step()
    saved = optimizer.state_dict()
    turned = pk.MaskedAdam([("b", params["b"]), ("a", params["a"])], mask)
    with pytest.raises(pk.PeckerKernelsError, match="another order"):
        turned.load_state_dict(saved)
    wrapped = copy.deepcopy(saved)
    wrapped["param_groups"][0]["param_names"] = ["module.a", "module.b"]
    optimizer.load_state_dict(wrapped)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    optimizer.step()


def test_a_mask_changed_after_the_optimizer_was_built_has_no_effect():
    params, mask, optimizer = made({"p": (100,)})
    keep, before = mask.bool("p").clone(), params["p"].detach().clone()
    optimizer.step()
    mask.bits["p"][2:10] = 255
    optimizer.step()
    assert torch.equal(params["p"].detach() != before, keep)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_are_let_go(impl):
    params, _, optimizer = made({"p": (100,)}, impl=impl)
    extra = torch.randn(100)
    optimizer.step(masked_grads={"p": extra})
    held = [weakref.ref(params["p"].grad), weakref.ref(extra)]
    optimizer.zero_grad()
    del extra
    assert all(reference() is None for reference in held)


def test_a_scaler_that_sums_its_findings_over_devices():
    params, _, optimizer = made({"p": (20,)})
    before = params["p"].detach().clone()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(2.0), None
    optimizer.step()
    assert torch.equal(params["p"], before)
    assert float(optimizer.state[params["p"]]["step"]) == 0
    optimizer.found_inf = 0  # what GradScaler hands over where no parameter has a gradient
    optimizer.step()
    assert bool(params["p"].isfinite().all())
    assert float(optimizer.state[params["p"]]["step"]) == 1


def test_under_a_scaler_masked_gradients_are_checked_too():
    params, mask, optimizer = made({"p": (20,)})
    before = params["p"].detach().clone()
    extra = torch.ones(20)
    extra[mask.indices("p")[0]] = float("inf")
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(8.0)
    optimizer.step(masked_grads={"p": extra})
    assert torch.equal(params["p"], before)


def test_a_plan_follows_layouts_and_dtypes():
    conv = torch.nn.Conv2d(4, 4, 3)
    mask = pk.SaliencyMask.random(conv.named_parameters(), 0.5)
    optimizer = pk.MaskedAdam(conv.named_parameters(), mask)
    seen = []
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        conv.to(memory_format=memory_format)
        for p in conv.parameters():
            p.grad = torch.randn(p.shape)
        before = {name: p.detach().clone() for name, p in conv.named_parameters()}
        optimizer.step()
        seen.append(optimizer._plans[0].which)
        assert all(torch.equal(p.detach() != before[name], mask.bool(name)) for name, p in conv.named_parameters())
    assert seen == ["cpu", "auto", "cpu"]
    optimizer.step(masked_grads={"weight": torch.ones(4, 4, 3, 3, dtype=torch.float64)})
    optimizer.step(masked_grads={"weight": torch.ones(4, 4, 3, 3, dtype=torch.bfloat16)})


def test_bfloat16_rounding_does_not_hang_on_the_layout():
    start, grad = torch.randn(8, 8, 5, 5).bfloat16(), torch.randn(8, 8, 5, 5).bfloat16()
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(start.clone().to(memory_format=memory_format))
        p.grad = grad.clone().to(memory_format=memory_format)
        pk.MaskedAdam([p], lr=0.01).step()
        results.append(p.detach().contiguous())
    assert torch.equal(*results)


def test_negative_views_count_with_their_sign():
    g = torch.randn(50)
    results = []
    for grad in (-g, torch._neg_view(g)):
        p = torch.nn.Parameter(torch.zeros(50))
        p.grad = grad
        pk.MaskedAdam([p], lr=0.1).step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_names_that_went_out_of_step_with_the_parameters():
    _, _, optimizer = made({"a": (8,), "b": (8,)})
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(ValueError, match="zip"):
        optimizer.step()


def test_skipped_is_there_after_a_copy_and_without_gradients():
    params, _, optimizer = made({"p": (8,)}, check_finite=True)
    assert copy.deepcopy(optimizer).skipped is None
    optimizer.zero_grad()
    optimizer.step()
    assert float(optimizer.skipped) == 0
    assert bitmask.popcount(bitmask.full_bits(params["p"].numel())) == 8


# What a call was told before and could have changed since: bits of a mask, sizes of state.


def test_a_mask_has_bits_of_its_own_and_remembers_nothing_of_them():
    raw = {"p": torch.tensor([1, 0], dtype=torch.uint8)}
    mask = pk.SaliencyMask(raw, {"p": (16,)})
    digest = mask.digest
    raw["p"].fill_(255)
    assert (mask.count, mask.digest) == (1, digest)
    mask.bits["p"].numpy()[:] = 255  # past the version counter
    assert (mask.count, mask.count_of("p"), mask.density) == (16, 16, 1.0)
    assert mask.digest != digest
    with pytest.raises(TypeError, match="counts"):
        pk.SaliencyMask(raw, {"p": (16,)}, counts={"p": 3})


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("rule", ["masked", "differentiated"])
def test_bits_changed_in_the_callers_mask_lead_nowhere(when, rule):
    params, mask, optimizer = made({"p": (40_000,), "q": (70, 70)}, keep=0.01)
    keep = {name: mask.bool(name) for name in params}
    step = (
        optimizer.step
        if rule == "masked"
        else lambda: optimizer.step(masked_grads={n: p.grad for n, p in params.items()})
    )
    if when == "after it":
        step()
    for bits in mask.bits.values():
        bits[:-1] = 255
    before = {name: p.detach().clone() for name, p in params.items()}
    step()
    assert optimizer.mask.count == sum(int(k.sum()) for k in keep.values())
    if rule == "masked":
        assert all(torch.equal(p.detach() != before[name], keep[name]) for name, p in params.items())


@pytest.mark.parametrize("level", range(native.cpu_level_max() + 1))
@pytest.mark.parametrize("taken", ["ranks", "nothing yet"])
@pytest.mark.parametrize("bits", [0x7F, 0xFF, 0])
def test_bits_changed_under_the_kernels_are_refused_before_anything_is_touched(level, taken, bits):
    params, _, optimizer = made({"p": (40_000,)}, keep=0.01, impl="cpu")
    p = params["p"]
    if taken == "ranks":
        optimizer.step()
    lanes = optimizer._lanes_of(p, "p")
    lanes.bits[: lanes.bits.numel() - 1] = bits
    before = p.detach().clone()
    chosen = native.cpu_level()
    native.set_cpu_level(level)
    try:
        with pytest.raises(pk.MaskError, match="bits of a mask were changed"):
            optimizer.step()
        with pytest.raises(pk.MaskError, match="bits of a mask were changed"):
            cpu.grad_stats(optimizer._plans[0].jobs, optimizer._settings(optimizer.param_groups[0], p.device), {})
    finally:
        native.set_cpu_level(chosen)
    assert torch.equal(p.detach(), before)


def test_compact_masked_gradients_are_read_only_where_the_ranks_hold():
    params, mask, optimizer = made({"p": (40_000,)}, keep=0.01, impl="cpu")
    compact = torch.ones(mask.count)
    optimizer.step(masked_grads={"p": compact})
    optimizer._lanes_of(params["p"], "p").bits[:-1] = 255
    before = params["p"].detach().clone()
    with pytest.raises(pk.MaskError, match="bits of a mask were changed"):
        optimizer.step(masked_grads={"p": compact})
    assert torch.equal(params["p"].detach(), before)


def test_state_made_smaller_where_it_lies_is_refused():
    params, _, optimizer = made({"p": (5000,)}, keep=None, impl="cpu")
    optimizer.step()
    optimizer.state[params["p"]]["exp_avg"].resize_(10)
    with pytest.raises(pk.PeckerKernelsError, match="holds 10 values"):
        optimizer.step()


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
def test_weights_that_share_memory_are_refused_in_one_step_and_served_in_groups(impl):
    whole = torch.zeros(100)
    one, other = torch.nn.Parameter(whole[:60]), torch.nn.Parameter(whole[40:])
    apart = torch.nn.Parameter(whole[60:])
    for p in (one, other, apart):
        p.grad = torch.ones_like(p)
    with pytest.raises(pk.PeckerKernelsError, match="share memory"):
        pk.MaskedAdam([one, other], impl=impl).step()
    assert not whole.any()
    pk.MaskedAdam([one, apart], lr=0.5, impl=impl).step()
    torch.testing.assert_close(whole, torch.full((100,), -0.5))
    pk.MaskedAdam([{"params": [one]}, {"params": [other]}], lr=0.5, impl=impl).step()
    torch.testing.assert_close(whole[40:60], torch.full((20,), -1.5))
    torch.testing.assert_close(whole[:40], torch.full((40,), -1.0))


def test_state_that_shares_memory_is_refused_by_the_functional_form():
    p, g, state = torch.zeros(10), torch.ones(10), torch.zeros(15)
    with pytest.raises(pk.PeckerKernelsError, match="share memory"):
        pk.masked_adam_([p, p.clone()], [g, g], [], [], [state[:10], state[5:]], 1, beta1=0.0)
    with pytest.raises(pk.PeckerKernelsError, match=r"scores\[0\] and scores\[1\] share memory"):
        torch.ops.pecker.accumulate_([state[:10], state[5:]], [g, g], "sum")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_gradients_that_are_no_floating_numbers(dtype):
    params, _, optimizer = made({"p": (9,)})
    odd = torch.ones(9, dtype=dtype)
    with pytest.raises(pk.PeckerKernelsError, match="floating numbers"):
        optimizer.step(masked_grads={"p": odd})
    p = params["p"].detach()
    with pytest.raises(pk.PeckerKernelsError, match="floating numbers"):
        pk.masked_adam_([p], [odd], [], [], [torch.zeros(9)], 1, beta1=0.0)
    scores = pk.SaliencyScores(params.items())
    with pytest.raises(pk.PeckerKernelsError, match=r"'p'.*floating numbers"):
        scores.add([odd])
    with pytest.raises(pk.PeckerKernelsError, match=r"'p'.*floating numbers"):
        scores.add_part("p", 0, odd)


def test_gradients_without_memory():
    params, _, optimizer = made({"p": (9,)})
    with pytest.raises(pk.PeckerKernelsError, match="on meta"):
        optimizer.step(masked_grads={"p": torch.ones(9, device="meta")})
    with pytest.raises(pk.PeckerKernelsError, match="on meta"):
        pk.SaliencyScores(params.items()).add([torch.ones(9, device="meta")])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, math.nan) for key in ("lr", "beta1", "beta2", "eps", "weight_decay", "clip_value", "clip_norm")],
        *[
            ("lr", -1.0),
            ("beta1", 1.0),
            ("beta1", -0.1),
            ("beta2", 1.0),
            ("eps", -1.0),
            ("clip_value", 0.0),
            ("seed", -1),
        ],
    ],
)
def test_the_functional_form_refuses_what_the_optimizer_refuses(key, value):
    p, v = torch.zeros(4), torch.zeros(4)
    with pytest.raises(pk.PeckerKernelsError, match=r"(?i)invalid"):
        pk.masked_adam_([p], [torch.ones(4)], [], [torch.zeros(4)], [v], 1, **{key: value})
    assert not p.any()


def test_state_of_another_shape_and_equal_size_is_refused():
    p, g = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(pk.MaskError, match=r"\[3, 2\]"):
        pk.masked_adam_([p], [g], [], [], [torch.zeros(3, 2)], 1, beta1=0.0)
    pk.masked_adam_([p], [g], [], [], [torch.zeros(6)], 1, beta1=0.0)  # flat state of weights that are all stepped on


def test_steps_of_one_optimizer_from_several_threads_come_one_after_the_other():
    params, _, optimizer = made({"p": (20_000,)}, keep=0.3)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(25)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert float(optimizer.state[params["p"]]["step"]) == 100
    copy.deepcopy(optimizer).step()
