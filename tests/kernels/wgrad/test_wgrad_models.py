"""Diffusion models under skip_weight_gradients: gradients of live weights, and backward FLOPs to the count."""

import pecker_kernels as pk
import pytest
import torch
from pecker_kernels.wgrad import weight_grad_flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from wgrad_rig import check_against, dense_grads, live_grads, loss_of, random_mask

pytest.importorskip("diffusers")


class Called(nn.Module):
    """A model as a function of images alone, returning a tensor."""

    def __init__(self, unet, **conditions):
        super().__init__()
        self.unet, self.conditions = unet, conditions

    def forward(self, x):
        return self.unet(x, torch.tensor([3, 500]), **self.conditions).sample


def class_conditional():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=4,
    )  # fmt: skip
    return Called(unet, class_labels=torch.tensor([1, 3]))


def text_conditional():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8, cross_attention_dim=6,
    )  # fmt: skip
    return Called(unet, encoder_hidden_states=torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)))


def images(dtype=torch.float64):
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


def in_float64(model):
    model.conditions = {k: v.double() if v.is_floating_point() else v for k, v in model.conditions.items()}
    return model.double()


@pytest.mark.some(6)
@pytest.mark.parametrize("make", [class_conditional, text_conditional])
@pytest.mark.parametrize("structure", ["element", "row", "tile", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_gradients_of_live_weights(make, structure, density):
    model = in_float64(make())
    mask = random_mask(model, density, structure, (4, 16))
    dense = dense_grads(model, images())
    with pk.skip_weight_gradients(model, mask, impl="reference") as skip:
        y = model(images())
        found = live_grads(skip, images())
        modes = {row.mode for row in skip.report()}
    # torch's attention chooses its kernel by what requires a gradient.
    torch.testing.assert_close(y, model(images()), rtol=1e-12, atol=1e-12)
    check_against(skip, mask, found, dense, tolerance=1e-9)
    assert "dead" in modes or density > 0.1
    assert structure in ("element", "tensor") or {"row": "rows", "tile": "tiles"}[structure] in modes


@pytest.mark.parametrize("compute", ["bfloat16", "autocast", "channels_last"])
@pytest.mark.parametrize("structure", ["row", "tile"])
def test_other_number_formats_and_layouts(compute, structure):
    model, x = class_conditional(), images(torch.float32)
    tolerance = 0.1
    if compute == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    elif compute == "channels_last":
        model, x, tolerance = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 1e-4
    mask = random_mask(model, 0.2, structure, (4, 16))
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):
        dense = dense_grads(model, x)
        with pk.skip_weight_gradients(model, mask, impl="reference") as skip:
            check_against(skip, mask, live_grads(skip, x), dense, tolerance)


def backward_flops(model, x):
    loss = loss_of(model(x))
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    for p in model.parameters():
        p.grad = None
    return counter.get_total_flops()


def positions_of(model, x):
    """{module: rows of its flattened input, or batch times output pixels} of one pass."""
    positions = {}

    def note(module, _, y):
        positions[module] = y.numel() // module.weight.shape[0]

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(note) for m in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return positions


def input_only_flops(model, x):
    """Backward FLOPs with frozen weights; one bias below the time embedding keeps its path, as live weights do."""
    lowest = model.unet.time_embedding.linear_1.bias
    flags = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.requires_grad_(p is lowest)
    count = backward_flops(model, x)
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    return count


@pytest.mark.some(2)
@pytest.mark.parametrize(("structure", "density"), [("row", 0.1), ("row", 0.5), ("tile", 0.3), ("tensor", 0.3)])
def test_backward_flops_are_those_of_live_weights(structure, density):
    model, x = class_conditional(), images(torch.float32).requires_grad_()
    positions = positions_of(model, x)
    below, dense = input_only_flops(model, x), backward_flops(model, x)
    assert dense == below + sum(weight_grad_flops(n, m.weight.numel()) for m, n in positions.items())
    mask = random_mask(model, density, structure, (4, 8))
    names = {p: name for name, p in model.named_parameters()}
    live = sum(weight_grad_flops(n, mask.count_of(names[m.weight])) for m, n in positions.items())
    with pk.skip_weight_gradients(model, mask, impl="reference"):
        found = backward_flops(model, x)
    if structure == "tile":  # convolutions compute every tap of the channels they touch
        assert found >= 0.98 * (below + live)
    else:
        assert found == pytest.approx(below + live, rel=0.02)
    assert found < below + 0.9 * (dense - below)
    assert backward_flops(model, x) == dense


def test_the_flop_gate_sees_a_layer_that_computes_everything(monkeypatch):
    from pecker_kernels.wgrad import conv

    model, x = class_conditional(), images(torch.float32).requires_grad_()
    mask = random_mask(model, 0.1)
    with pk.skip_weight_gradients(model, mask):
        right = backward_flops(model, x)
    real = conv.Convolution.grad_rows

    def wasteful(self, grad_out, x, rows, shape):
        everything = real(self, grad_out, x, slice(0, shape[0]), shape)
        return everything[rows]

    monkeypatch.setattr(conv.Convolution, "grad_rows", wasteful)
    with pk.skip_weight_gradients(model, mask):
        assert backward_flops(model, x) > 1.02 * right


def test_the_report_tells_every_layer():
    model = class_conditional()
    mask = random_mask(model, 0.2)
    with pk.skip_weight_gradients(model, mask) as skip:
        rows = {row.name: row for row in skip.report()}
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert set(rows) == owners
    for name, module in model.named_modules():
        if name in rows and isinstance(module, nn.Conv2d):
            keep = mask.bool(f"{name}.weight").flatten(1).any(1)
            assert rows[name].live_rows == pytest.approx(float(keep.float().mean()))
            assert rows[name].mode == ("dead" if not keep.any() else "dense" if keep.all() else "rows")
    total = sum(p.numel() for p in model.parameters())
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False)) for name in owners}
    assert sum(rows[name].live_weights * n for name, n in sizes.items()) / total == pytest.approx(mask.density)
