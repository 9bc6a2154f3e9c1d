"""Adapters as θ: a masked product, against float64 written from the formula y = (W + m ⊙ s B A) x."""

import pytest
import torch
from tiny_models import write_tiny_model
from torch.nn import functional as F

from pecker_fast.networks import AdaptedUNet, load_denoiser, with_adapters

SCALE = 0.7


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_denoiser(write_tiny_model(tmp_path_factory.mktemp("student") / "model")).freeze()


def stirred(teacher, seed=3, **keys):
    student = with_adapters(teacher, 3, scale=SCALE, **keys)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in student.named_parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return student


def masks(student, structure, seed=5):
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, weight in student.whole_parameters():
        bits = torch.rand(weight.shape, generator=draw) < 0.4
        if structure == "row":
            bits = (
                (torch.rand(len(weight), generator=draw) < 0.5)
                .view(-1, *(1 for _ in weight.shape[1:]))
                .expand(weight.shape)
            )
        if structure == "tensor":
            bits = torch.full(weight.shape, bool(torch.rand((), generator=draw) < 0.5))
        found[name] = bits
    return found


def products(student, kept):
    """m ⊙ s B A by name of the weight, float64."""
    found = {}
    for name, one in student.unet.adapters().items():
        ba = (one.lora_b.double().flatten(1) @ one.lora_a.double().flatten(1)).view(-1, *one.lora_a.shape[1:])
        found[f"{name}.weight"] = SCALE * ba * kept[f"{name}.weight"]
    return found


def call(network, n=2):
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(n, *network.sample_shape, generator=draw)
    t, c = torch.tensor([100, 600][:n]), torch.tensor([0, 2][:n])
    return x, t, c


@pytest.mark.parametrize("structure", ["element", "row", "tensor"])
def test_a_student_is_its_base_with_the_masked_product(teacher, structure):
    student = stirred(teacher)
    kept = masks(student, structure)
    want = {name: p.double() for name, p in teacher.named_parameters()}
    added = products(student, kept)
    student.unet.restrict(kept.__getitem__)
    expected = {f"{name}.weight" for name in student.unet.adapters()}
    assert expected == {name for name in added if kept[name].any()}
    plain = student.without_adapters()
    for name, p in plain.named_parameters():
        change = (p.double() - want[name]).abs()
        if name in added:
            assert torch.allclose(p.double(), want[name] + added[name], atol=1e-6)
            assert not change[~kept[name]].any()
        else:
            assert change.max() == 0
    with torch.no_grad():
        assert (student.eps(*call(student)) - plain.eps(*call(plain))).abs().max() < 1e-5
        assert (student.eps(*call(student)) - teacher.eps(*call(teacher))).abs().max() > 1e-3
    scattered = [one.scattered for one in student.unet.adapters().values()]
    assert any(scattered) == (structure == "element")


@pytest.mark.parametrize("structure", ["element", "row"])
def test_gradients_of_a_layer_are_those_of_the_formula(teacher, structure):
    student = stirred(teacher)
    kept = masks(student, structure)
    student.unet.restrict(kept.__getitem__)
    for name in ("conv_in", "time_embedding.linear_1"):
        layer, one = teacher.unet.get_submodule(name), student.unet.adapters()[name]
        convolution = layer.weight.dim() == 4
        x = torch.randn(
            2, layer.weight.shape[1], *((6, 6) if convolution else ()), generator=torch.Generator().manual_seed(1)
        )
        adapted = {id(layer): call for layer, call in student.unet._swaps}[id(layer)]
        out = adapted(x)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        a, b = torch.autograd.grad((out * g).sum(), (one.lora_a, one.lora_b))
        a64, b64 = (p.detach().double().requires_grad_(True) for p in (one.lora_a, one.lora_b))
        ba = (b64.flatten(1) @ a64.flatten(1)).view(-1, *a64.shape[1:])
        weight = layer.weight.double() + kept[f"{name}.weight"] * SCALE * ba
        y = (
            F.conv2d(x.double(), weight, layer.bias.double(), padding=1)
            if convolution
            else F.linear(x.double(), weight, layer.bias.double())
        )
        want = torch.autograd.grad((y * g.double()).sum(), (a64, b64))
        assert torch.allclose(out.double(), y, atol=1e-5)
        for found, exact in zip((a, b), want):
            assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1)


def test_what_a_mask_leaves_alone_keeps_its_very_bits(teacher):
    """−0.0 too."""
    start = teacher.clone()
    with torch.no_grad():
        start.unet.conv_in.weight.view(-1)[:4] = -0.0
    student = stirred(start)
    kept = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in student.whole_parameters()}
    kept["conv_in.weight"].view(-1)[2] = True
    student.unet.restrict(kept.__getitem__)
    assert list(student.unet.adapters()) == ["conv_in"]
    found, before = student.without_adapters().unet.conv_in.weight, start.unet.conv_in.weight
    same = found.view(torch.int32) == before.view(torch.int32)
    assert torch.equal(same, ~kept["conv_in.weight"])


def test_a_copy_has_the_same_mask_and_adapters_of_its_own(teacher):
    student = stirred(teacher)
    student.unet.restrict(masks(student, "element").__getitem__)
    twin = student.clone()
    assert isinstance(twin.unet, AdaptedUNet)
    assert list(twin.unet.adapters()) == list(student.unet.adapters())
    with torch.no_grad():
        assert torch.equal(twin.eps(*call(twin)), student.eps(*call(student)))
        next(iter(twin.unet.adapters().values())).lora_b.add_(1)
        assert not torch.equal(twin.eps(*call(twin)), student.eps(*call(student)))
    assert twin.unet.base is teacher.unet
