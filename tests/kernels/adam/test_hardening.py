"""What happens around a step: tensors that moved, state that does not fit, masks that change, gradients let go."""

import copy
import weakref

import pecker_kernels as pk
import pytest
import torch
from pecker_kernels import reference
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
