"""GroupNorm and SiLU as one operation: C++ at every instruction level and the reference, against float64."""

import sys
from pathlib import Path

import pecker_kernels as pk
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from norm_rig import check_forward, check_way_back, gradients, images, norm_of
from pecker_kernels import native, reference
from pecker_kernels.norm import cpu, function

# strips and runs whole and ragged; few and many groups; one pixel; matrices without pixels
SHAPES = (
    (2, 6, (3, 5), 3), (1, 32, (8, 8), 8), (3, 4, (), 2), (2, 40, (7,), 4), (2, 48, (9, 7), 48), (1, 24, (33, 2), 1),
    (2, 1040, (2, 2), 520), (5, 20, (1, 1), 5),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("silu", [True, False])
def test_cpu(shape, last, silu, level):
    check_forward(shape, torch.float32, last, "cpu", silu=silu)
    check_way_back(shape, torch.float32, last, "cpu", silu=silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_reference(dtype, shape, last):
    check_forward(shape, dtype, last, "reference")
    check_way_back(shape, dtype, last, "reference")


@pytest.mark.parametrize("kind", ["mean", "activation", "group", "way back"])
def test_the_gates_see_a_broken_kernel(kind, monkeypatch):
    forward, backward = cpu.forward, cpu.backward

    def worse(x, weight, bias, groups, eps, silu):
        if kind == "mean":
            bias = bias + 1e-5
        return forward(x, weight, bias, groups // 2 if kind == "group" else groups, eps, silu and kind != "activation")

    def one_sided(grad, x, weight, bias, mean, rstd, *rest):
        return backward(grad, x, weight, bias, mean, torch.zeros_like(rstd) if kind == "way back" else rstd, *rest)

    monkeypatch.setattr(cpu, "backward", one_sided)
    if kind != "way back":
        monkeypatch.setattr(cpu, "forward", worse)
        with pytest.raises(AssertionError):
            check_forward(SHAPES[1], torch.float32, False, "cpu")
    else:
        with pytest.raises(AssertionError):
            check_way_back(SHAPES[1], torch.float32, False, "cpu")


@pytest.mark.parametrize("last", [False, True])
def test_the_same_bits_whatever_the_threads(last):
    x, weight, bias, grad = images((16, 64, (32, 32), 8), torch.float32, last)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = pk.group_norm_silu(x, weight, bias, 8, impl="cpu")
            found.append((y, *gradients(lambda *t: pk.group_norm_silu(*t, 8, impl="cpu"), x, weight, bias, grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("last", [False, True])
def test_numbers_that_are_far_out(last, level):
    """Saturated, denormal and not finite numbers come out as torch's do."""
    x, weight, bias, _ = images((1, 8, (4, 8), 8), torch.float32, last)
    for factor in (1e-20, 1e4):
        y, peer = (f(x * factor, 1e3 * weight, bias) for f in (_ours, _theirs))
        assert torch.allclose(y, peer, rtol=2e-5, atol=1e-6 * float(peer.abs().max()))
    flat = torch.full_like(x, 7.0)  # no variance at all
    assert torch.allclose(_ours(flat, weight, bias), F.silu(bias).view(1, -1, 1, 1).expand_as(flat), rtol=1e-6)
    for bad in (float("nan"), float("inf")):
        broken = x.clone(memory_format=torch.preserve_format)
        broken[0, 3] = bad  # a group of its own: the others stay whole
        assert torch.equal(_ours(broken, weight, bias).isnan(), _theirs(broken, weight, bias).isnan())
    u = torch.tensor([-float("inf"), -200.0, -89.0, -87.5, 0.0, 87.5, 200.0, float("inf"), float("nan")])
    silu = _activation(u)
    assert torch.equal(silu.isnan(), F.silu(u).isnan())
    assert torch.allclose(silu.nan_to_num(), F.silu(u).nan_to_num(), rtol=1e-6, atol=1e-36)


def _ours(x, weight, bias):
    return pk.group_norm_silu(x, weight, bias, 8, impl="cpu")


def _theirs(x, weight, bias):
    return norm_of(x, weight, bias, 8)


def _activation(u):
    """σ-weighted u by a norm that leaves u as it is: weight 0, bias u."""
    return pk.group_norm_silu(torch.randn(1, len(u), 2), torch.zeros(len(u)), u, 1, impl="cpu")[0, :, 0]


def test_what_is_not_needed_is_not_computed():
    x, weight, bias, grad = images(SHAPES[1], torch.float32, False)
    _, mean, rstd = cpu.forward(x, weight, bias, 8, 1e-5, True)
    only_x = cpu.backward(grad, x, weight, bias, mean, rstd, 8, True, True, False)
    only_weight = cpu.backward(grad, x, weight, bias, mean, rstd, 8, True, False, True)
    both = cpu.backward(grad, x, weight, bias, mean, rstd, 8, True)
    assert only_x[1:] == (None, None)
    assert only_weight[0] is None
    assert torch.equal(only_x[0], both[0])
    assert all(torch.equal(a, b) for a, b in zip(only_weight[1:], both[1:]))
    frozen = pk.group_norm_silu(x.requires_grad_(), weight, bias, 8)
    frozen.backward(grad)
    assert torch.equal(x.grad, both[0])


def test_other_strides_and_no_images():
    x, weight, bias, grad = images((2, 8, (6, 4), 4), torch.float32, False)
    turned = x.transpose(2, 3)
    y = pk.group_norm_silu(turned, weight, bias, 4, impl="cpu")
    assert torch.allclose(y, norm_of(turned, weight, bias, 4), atol=1e-5)
    wide = torch.zeros(2, 16, 6, 4)
    wide[:, ::2] = x
    grads = gradients(lambda *t: pk.group_norm_silu(t[0][:, ::2], *t[1:], 4, impl="cpu"), wide, weight, bias, grad)
    assert torch.allclose(grads[0][:, ::2], gradients(lambda *t: norm_of(*t, 4), x, weight, bias, grad)[0], atol=1e-5)
    empty = torch.empty(0, 8, 2, 2, requires_grad=True)
    leaf = weight.clone().requires_grad_()
    pk.group_norm_silu(empty, leaf, bias, 4).sum().backward()
    assert empty.grad.shape == empty.shape
    assert not leaf.grad.any()


def test_what_is_refused():
    x, weight, bias, _ = images((2, 6, (3, 5), 3), torch.float32, False)
    for args, words in (
        ((x, weight, bias, 4), "6 channels are no multiple of 4 groups"),
        ((x, weight[:5], bias, 3), r"weight is \[5\]"),
        ((x.long(), weight, bias, 3), "takes floating"),
        ((x[0, 0, 0], weight, bias, 3), "takes floating"),
    ):
        with pytest.raises(pk.PeckerKernelsError, match=words):
            pk.group_norm_silu(*args)
    with pytest.raises(pk.PeckerKernelsError, match="the C\\+\\+ norm takes float32 CPU tensors"):
        pk.group_norm_silu(x.double(), weight.double(), bias.double(), 3, impl="cpu")
    with pytest.raises(pk.PeckerKernelsError, match="unknown implementation"):
        pk.group_norm_silu(x, weight, bias, 3, impl="fast")
    leaf = x.requires_grad_()
    (first,) = torch.autograd.grad(pk.group_norm_silu(leaf, weight, bias, 3).sum(), leaf, create_graph=True)
    assert not first.requires_grad  # differentiable once


def test_auto_takes_the_kernel_where_it_can(monkeypatch):
    x, weight, bias, _ = images((2, 6, (3, 5), 3), torch.float32, False)
    taken = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: taken.append(args[0].dtype) or forward(*args))
    pk.group_norm_silu(x, weight, bias, 3)
    pk.group_norm_silu(x.double(), weight.double(), bias.double(), 3)
    assert taken == ([torch.float32] if native.available() else [])
    assert function._serving(x, weight, bias, "auto") == ("cpu" if native.available() else "reference")


def test_it_compiles_into_one_graph():
    x, weight, bias, grad = images((2, 6, (3, 5), 3), torch.float32, False)
    compiled = torch.compile(lambda *t: pk.group_norm_silu(*t, 3), backend="aot_eager", fullgraph=True)
    ours = gradients(lambda *t: pk.group_norm_silu(*t, 3), x, weight, bias, grad)
    for a, b in zip(gradients(compiled, x, weight, bias, grad), ours):
        assert torch.equal(a, b)


def test_the_reference_knows_its_own_way_back():
    x, weight, bias, grad = images((2, 6, (3, 5), 3), torch.float64, False)
    _, mean, rstd = reference.group_norm_silu(x, weight, bias, 3, 1e-5, True)
    found = reference.group_norm_silu_backward(grad, x, weight, bias, mean, rstd, 3, True)
    for mine, theirs in zip(found, gradients(lambda *t: norm_of(*t, 3), x, weight, bias, grad)):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)
