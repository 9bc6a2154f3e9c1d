"""Layers under skip_weight_gradients: gradients of live weights, what is kept for backward, and how it is undone."""

import copy
import pickle

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import check_sums
from pecker_kernels import reference, wgrad
from pecker_kernels.torch_library import wgrad as ops_wgrad
from pecker_kernels.wgrad import conv, function, linear, plan, rows, tiles
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from wgrad_rig import check_against, dense_grads, live_grads, live_part, loss_of, mask_of, random_mask

STRUCTURES = ("element", "row", "tile", "tensor")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def images(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layers(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.SiLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.SiLU(), nn.Flatten(2), nn.Linear(16, 24), nn.Linear(24, 20, bias=False),
    )  # fmt: skip
    return model.to(dtype)


def check(model, mask, *inputs, impl="auto", tolerance=None):
    dense = dense_grads(model, *inputs)
    with pk.skip_weight_gradients(model, mask, impl=impl) as skip:
        y = model(*inputs)
        with skip.paused():
            assert torch.equal(y, model(*inputs))
        check_against(skip, mask, live_grads(skip, *inputs), dense, tolerance)
    return skip


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_every_structure(structure, impl, density):
    model = layers()
    mask = random_mask(model, density, structure)
    skip = check(model, mask, images(2, 3, 8, 8), impl=impl)
    modes = {row.mode for row in skip.report()}
    assert modes & {"rows", "tiles", "dead"} or (structure, density) == ("element", 0.4)
    assert ("tiles" in modes) == (structure == "tile" and impl == "reference")


@pytest.mark.parametrize("tile", [(4, 8), (3, 5), (1, 1), (16, 1), (100, 7), (5, 100)], ids=str)
def test_tiles_of_any_size(tile):
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(2), nn.Linear(36, 11)).double()
    check(model, random_mask(model, 0.5, "tile", tile), images(2, 3, 8, 8), impl="reference")


CONVS = [
    (nn.Conv1d, (3, 10), {}),
    (nn.Conv1d, (3, 10), {"stride": 2, "dilation": 2, "padding": 1, "bias": False}),
    (nn.Conv1d, (3, 10), {"kernel_size": 4, "padding": "same"}),
    (nn.Conv2d, (3, 9, 8), {"stride": (2, 1), "padding": (1, 2)}),
    (nn.Conv2d, (3, 9, 8), {"dilation": (1, 2), "padding": "same"}),
    (nn.Conv2d, (3, 9, 8), {"kernel_size": (2, 4), "padding": "same"}),
    (nn.Conv2d, (3, 9, 8), {"kernel_size": 1, "padding": "valid"}),
    (nn.Conv3d, (3, 5, 6, 4), {"padding": 1, "stride": 2}),
    (nn.Conv3d, (3, 5, 6, 4), {"kernel_size": (2, 3, 1), "padding": "same"}),
]


@pytest.mark.parametrize(("kind", "shape", "options"), CONVS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("structure", ["row", "tile"])
def test_convolutions(kind, shape, options, structure):
    torch.manual_seed(0)
    layer = kind(3, 10, **{"kernel_size": 3, **options}).double()
    mask = random_mask(layer, 0.5, structure, (4, 4))
    for x in (images(2, *shape), images(*shape)):
        x.requires_grad_()
        skip = check(layer, mask, x, impl="reference")
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        with pk.skip_weight_gradients(layer, mask):
            (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert skip.report()[0].kind == "conv"


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", ["element", "row", "tile"])
def test_linear(shape, bias, structure):
    torch.manual_seed(0)
    layer = nn.Linear(5, 13, bias=bias).double()
    check(layer, random_mask(layer, 0.3, structure, (2, 2)), images(*shape).requires_grad_(), impl="reference")


@pytest.mark.parametrize("kept", [slice(2, 6), slice(0, 1), slice(0, 13, 3)], ids=str)
def test_live_rows_in_one_piece_or_not(kept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 13), nn.Linear(13, 13, bias=False)).double()
    keep = torch.zeros(13, dtype=torch.bool)
    keep[kept] = True
    mask = mask_of(model, {"0.weight": keep[:, None], "0.bias": ~keep, "1.weight": keep[:, None]})
    check(model, mask, images(4, 5))


def test_a_bias_has_a_mask_of_its_own():
    """Dead, partly live and whole biases on dead, partly live and whole weights."""
    some = torch.arange(7) % 3 == 0
    x = images(4, 7).requires_grad_()
    for weight in (False, some[:, None], True):
        for bias in (False, some, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7)).double()
            mask = mask_of(model, {"0.weight": True, "1.weight": weight, "1.bias": bias})
            check(model, mask, x)


class Odd(nn.Module):
    """What is left alone: groups, transposed, padded otherwise, a subclass's forward, embedding, norm, own parameter, tied."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.groups, self.up = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.around = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.twice, self.norm = self.Doubled(6, 6), nn.LayerNorm(6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, index):
        h = self.embedding(index).transpose(1, 2)  # [N, 8, 6]
        h = self.norm(self.twice(self.around(self.up(self.groups(h)))))
        return self.other(self.one(h).tanh()) * self.scale


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("density", [0.03, 0.5])
def test_other_layers_are_left_alone_unless_dead(structure, density):
    torch.manual_seed(0)
    model = Odd().double()
    mask = random_mask(model, density, structure)
    index = torch.arange(12).view(2, 6) % 5
    skip = check(model, mask, index)
    for row in skip.report():
        assert row.mode in ("dense", "dead") or row.name == "one"
    assert {row.kind for row in skip.report()} == {"linear", "conv", "norm", "other"}
    with pk.skip_weight_gradients(model, mask):
        for name, p in model.named_parameters():
            assert p.requires_grad == (mask.count_of(name) > 0)
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_frozen_before_stay_so():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    mask = random_mask(model, 0.5)  # frozen parameters are not in it
    assert "0.weight" not in mask.names
    check(model, mask, images(3, 4))
    with pk.skip_weight_gradients(model, mask) as skip:
        assert skip.leaves[0] is None
        assert skip.leaves[3] is None
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False, True, True]


def saved_bytes(model, x):
    """{storage address: bytes} kept for the backward pass, the parameters' own apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return kept, y


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dead_layers_keep_no_input(kind):
    first, second = (nn.Linear(6, 6), nn.Linear(6, 6)) if kind == "linear" else (nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    model, x = (
        nn.Sequential(first, second),
        images(*((9, 6) if kind == "linear" else (2, 6, 5, 5)), dtype=torch.float32),
    )
    some = torch.arange(6) < 2
    mask = mask_of(model, {"0.weight": some.view(6, *[1] * (first.weight.dim() - 1))})
    inner = []
    handle = second.register_forward_pre_hook(lambda module, given: inner.append(given[0].data_ptr()))
    with pk.skip_weight_gradients(model, mask):
        kept, _ = saved_bytes(model, x)
        assert set(kept) == {x.data_ptr()}  # of the live layer: the gate sees a layer that keeps its input
        assert inner[-1] not in kept
    with pk.skip_weight_gradients(model, mask_of(model, {"1.bias": some})):
        kept, y = saved_bytes(model, x)
        assert not kept
        assert y.requires_grad
    kept, _ = saved_bytes(model, x)
    assert len(kept) == 2
    assert inner[-1] in kept
    handle.remove()


@pytest.mark.parametrize("structure", ["row", "tile"])
def test_back_propagation_stops_below_the_lowest_live_layer(structure):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1)
    ).double()
    mask = mask_of(model, {"3.weight": (torch.arange(6) < 2).view(6, 1, 1, 1)})
    mask.structure, mask.tile = structure, (2, 36)
    x = images(2, 3, 8, 8)
    with pk.skip_weight_gradients(model, mask, impl="reference") as skip:
        for i in range(3):
            assert model[: i + 1](x).grad_fn is None
        assert model[:4](x).grad_fn is not None
        assert live_grads(skip, x)[4].shape == (2 * 36,)
        counts = []
        for inputs in (x, x.clone().requires_grad_()):
            y = model(inputs).sum()
            with FlopCounterMode(display=False) as counter:
                y.backward()
            counts.append(counter.get_total_flops())
        assert counts[0] < counts[1]
    assert model[:1](x).grad_fn is not None


@pytest.mark.parametrize("structure", STRUCTURES)
def test_undo_restores_everything(structure):
    model = layers()
    model[7].bias.requires_grad_(False)
    before, flags = dict(model.state_dict()), [p.requires_grad for p in model.parameters()]
    attributes = [set(vars(m)) for m in model.modules()]
    skip = pk.skip_weight_gradients(model, random_mask(model, 0.1, structure))
    assert [p.requires_grad for p in model.parameters()] != flags
    with pytest.raises(pk.PeckerKernelsError, match="undo the first"):
        pk.skip_weight_gradients(model, skip.mask)
    with pytest.raises(pk.PeckerKernelsError, match="undo the first"):
        pk.skip_weight_gradients(nn.Sequential(model), skip.mask, prefix="0.")
    skip.undo()
    skip.undo()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(m.forward.__func__ is type(m).forward for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images(1, 3, 8, 8)), model(images(1, 3, 8, 8)))
    pk.skip_weight_gradients(model, skip.mask).undo()


def test_a_second_undo_leaves_a_later_skip_alone():
    model = nn.Linear(4, 6)
    mask = random_mask(model, 0.3)
    first = pk.skip_weight_gradients(model, mask)
    first.undo()
    second = pk.skip_weight_gradients(model, mask)
    first.undo()
    assert second.active
    assert not first.active
    assert "forward" in vars(model)
    second.undo()


def test_copies_made_meanwhile_are_plain_models():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)).double()
    with pk.skip_weight_gradients(model, random_mask(model, 0.3)):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                copied[0].weight.zero_()
            assert copied[0].forward.__self__ is copied[0]
            assert torch.equal(copied[0](images(2, 4)), copied[0].bias.expand(2, 6))
            assert model[0].weight.count_nonzero()
            for p in copied.parameters():
                p.requires_grad_()
            check(copied, random_mask(copied, 0.3), images(3, 4))
            assert all("forward" not in vars(m) for m in copied.modules())


def test_paused_is_the_model_itself():
    model, x = layers(), images(2, 3, 8, 8)
    dense = dense_grads(model, x)
    with pk.skip_weight_gradients(model, random_mask(model, 0.1, "tensor")) as skip:
        with skip.paused(), skip.paused():
            assert all(p.requires_grad for p in model.parameters())
            assert all(torch.equal(a, b) for a, b in zip(dense_grads(model, x), dense, strict=True))
        assert not all(p.requires_grad for p in model.parameters())
        check_against(skip, skip.mask, live_grads(skip, x), dense)
        with skip.paused():
            skip.undo()
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("structure", ["element", "row", "tile"])
def test_backward_and_grad_agree(structure):
    model, x = layers(), images(2, 3, 8, 8)
    with pk.skip_weight_gradients(model, random_mask(model, 0.1, structure), impl="reference") as skip:
        found = live_grads(skip, x)
        for times in (1, 2):
            loss_of(model(x)).backward()
            for a, b in zip(found, skip.grads(), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(b, times * a, rtol=1e-14, atol=0)
        aligned = iter(torch.autograd.grad(loss_of(model(x)), [leaf for leaf in skip.leaves if leaf is not None]))
        spread = [None if leaf is None else next(aligned) for leaf in skip.leaves]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(skip.compact(spread), found, strict=True))
        skip.zero_grad()
        assert skip.grads() == [None] * len(skip.leaves)


def test_a_full_mask_changes_nothing():
    model, x = layers(dtype=torch.float32), images(2, 3, 8, 8, dtype=torch.float32)
    dense = dense_grads(model, x)
    with pk.skip_weight_gradients(model, pk.SaliencyMask.full(model.named_parameters())) as skip:
        assert all(leaf is p for leaf, p in zip(skip.leaves, model.parameters(), strict=True))
        assert all("forward" not in vars(m) for m in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(live_grads(skip, x), dense, strict=True))
    assert {row.mode for row in skip.report()} == {"dense"}


def gradients(layer, x, grad_out):
    """{name: gradient} of the parameters and of x for a given gradient of the layer's output."""
    x = x.detach().requires_grad_()
    names = [*(name for name, _ in layer.named_parameters()), "x"]
    return dict(zip(names, torch.autograd.grad(layer(x), [*layer.parameters(), x], grad_out), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", ["element", "row", "tile"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_tolerance_rule(dtype, structure, kind):
    torch.manual_seed(0)
    layer, shape = (nn.Linear(40, 24), (33, 40)) if kind == "linear" else (nn.Conv2d(8, 12, 3, padding=1), (3, 8, 6, 6))
    layer.to(dtype)
    x = images(*shape, dtype=dtype)
    grad_out = images(*layer(x).shape, dtype=dtype, seed=2)
    mask = random_mask(layer, 0.02 if structure == "element" else 0.3, structure)
    peer = gradients(layer, x, grad_out)
    exact = copy.deepcopy(layer).double()
    truth = gradients(exact, x.double(), grad_out.double())
    with torch.no_grad():
        for p in exact.parameters():
            p.abs_()
    scale = gradients(exact, x.double().abs(), grad_out.double().abs())
    x.requires_grad_()
    with pk.skip_weight_gradients(layer, mask, impl="reference") as skip:
        assert skip.report()[0].mode in ("rows", "tiles")
        leaves = [leaf for leaf in skip.leaves if leaf is not None]
        *found, dx = torch.autograd.grad(layer(x), [*leaves, x], grad_out)
        found = dict(zip(mask.names, skip.compact(found), strict=True))
    check_sums(dx, peer["x"], truth["x"], scale["x"])
    for name, g in found.items():
        if g is not None:
            check_sums(g, *(live_part(d[name], mask, name, g) for d in (peer, truth, scale)))


def test_channels_last_stays_channels_last():
    torch.manual_seed(0)
    g = images(2, 8, 5, 5).to(memory_format=torch.channels_last)
    picked = rows.pick(g, 1, torch.tensor([0, 3, 4]))
    assert picked.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(picked, g[:, [0, 3, 4]])
    assert rows.pick(g, 1, slice(2, 5)).data_ptr() == g[:, 2:].data_ptr()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3)).double()
    x = images(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    seen = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        for structure in ("row", "tile", "element"):
            check(model, random_mask(model, 0.2, structure), x, impl="reference")
        dead = mask_of(model, {"0.bias": True})
        with pk.skip_weight_gradients(model, dead):
            (dx,) = torch.autograd.grad(model(x).square().sum(), x)
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)
        seen.append(dx.is_contiguous(memory_format=torch.channels_last) or not expected.is_contiguous(
            memory_format=torch.channels_last
        ))  # fmt: skip
    assert all(seen)


def test_a_channels_last_group_norm_above_dead_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 3)).double()
    x = images(2, 3, 8, 8).to(memory_format=torch.channels_last)
    mask, dense = mask_of(model, {"1.weight": True}), dense_grads(model, x)
    model.to(memory_format=torch.channels_last)
    with pk.skip_weight_gradients(model, mask) as skip:
        check_against(skip, mask, live_grads(skip, x), dense)
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("structure", ["element", "row", "tile", "tensor"])
def test_autocast(structure):
    model, x = layers(dtype=torch.float32), images(2, 3, 8, 8, dtype=torch.float32)
    mask = random_mask(model, 0.3, structure)
    with torch.autocast("cpu", torch.bfloat16):
        dense, expected = dense_grads(model, x), model(x)
    with pk.skip_weight_gradients(model, mask, impl="reference") as skip:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            found = live_grads(skip, x)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        check_against(skip, mask, found, dense, tolerance=2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        # Products of a forward pass without autocast stay in its dtype, wherever backward is called.
        linear_loss = model[7:](images(2, 4, 16, dtype=torch.float32).requires_grad_()).sum()
        with torch.autocast("cpu", torch.bfloat16):
            linear_loss.backward()


def test_float64_is_not_autocast():
    model, x = nn.Linear(5, 7).double(), images(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, random_mask(model, 0.4), x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("structure", ["row", "tile"])
def test_checkpointing(reentrant, structure):
    model, x = layers(), images(2, 3, 8, 8).requires_grad_()
    mask = random_mask(model, 0.3, structure)
    dense = dense_grads(model, x)
    with pk.skip_weight_gradients(model, mask, impl="reference") as skip:
        loss_of(checkpoint(model, x, use_reentrant=reentrant)).backward()
        check_against(skip, mask, skip.grads(), dense)


def test_no_grad_and_double_backward_and_in_place_writes():
    model, x = nn.Linear(5, 7).double(), images(3, 5).requires_grad_()
    with pk.skip_weight_gradients(model, random_mask(model, 0.4)) as skip:
        with torch.no_grad():
            assert model(x).grad_fn is None
        leaf = next(leaf for leaf in skip.leaves if leaf is not None)
        (g,) = torch.autograd.grad(model(x).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.sum().backward()
        y = model(x).sum()
        with torch.no_grad():
            model.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_prefix_names_a_part_of_the_mask():
    whole = nn.ModuleDict({"unet": layers(), "text": nn.Linear(3, 3)})
    mask, x = random_mask(whole, 0.4), images(2, 3, 8, 8)
    dense = dense_grads(whole["unet"], x)
    with pk.skip_weight_gradients(whole["unet"], mask, prefix="unet.") as skip:
        check_against(skip, mask, live_grads(skip, x), dense, prefix="unet.")


def test_refusals():
    model = layers(dtype=torch.float32)
    mask = random_mask(model, 0.4, "tile", (16, 16))
    for match, error, arguments, more in (
        ("unknown implementation impl='cuda'", pk.PeckerKernelsError, (model, mask), {"impl": "cuda"}),
        ("impl='cpu' is not available", pk.PeckerKernelsError, (model, mask), {"impl": "cpu"}),
        ("parameter '7.weight' is not in the mask", pk.MaskError, (model, random_mask(model[:7])), {}),
        ("has a tensor '7.weight' that is not", pk.MaskError, (model[:7], mask), {}),
        (r"has shape \[3, 5\]", pk.MaskError, (nn.Linear(5, 3), random_mask(nn.Linear(4, 3))), {}),
        ("parameter 'x.0.weight' is not in the mask", pk.MaskError, (model, mask), {"prefix": "x."}),
    ):
        with pytest.raises(error, match=match):
            pk.skip_weight_gradients(*arguments, **more)
    if not torch.cuda.is_available() and not pk.dispatch.interpreted():
        with pytest.raises(pk.PeckerKernelsError, match=r"takes CUDA tensors, got cpu|not installed"):
            pk.skip_weight_gradients(model, mask, impl="triton")
    assert all("forward" not in vars(m) for m in model.modules())
    with pk.skip_weight_gradients(model, mask) as skip:
        with pytest.raises(pk.PeckerKernelsError, match="1 gradients for"):
            skip.compact([None])
        leaves = [leaf for leaf in skip.leaves if leaf is not None]
        with pytest.raises(pk.PeckerKernelsError, match="has shape"):
            skip.compact([torch.zeros(2, 2, 2)] * len(leaves))


def test_refusals_of_the_grouped_product():
    g, x, table = torch.zeros(4, 6), torch.zeros(4, 5), torch.zeros(0, 4, dtype=torch.int64)
    for match, arguments in (
        (r"got \[4, 6\], \[3, 5\]", (g, x[:3], table, 0, 16, 16)),
        ("one floating dtype", (g, x.double(), table, 0, 16, 16)),
        (r"int64 \[tiles, 4\]", (g, x, table.int(), 0, 16, 16)),
        ("at least 1x1", (g, x, table, 0, 0, 16)),
        ("impl='cpu'", (g, x, table, 0, 16, 16, "cpu")),
    ):
        with pytest.raises(pk.PeckerKernelsError, match=match):
            ops_wgrad.tile_weight_grad(*arguments)
    assert ops_wgrad.tile_weight_grad(g, x, table, 0, 16, 16).shape == (0,)


@pytest.mark.parametrize("tile", [(4, 8), (3, 5), (1, 1), (40, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strips_are_the_dense_product(tile, dtype):
    g, x = images(9, 13, dtype=dtype), images(9, 21, dtype=dtype, seed=2)
    holder = {"w": torch.zeros(13, 21)}
    mask = pk.SaliencyMask.random(holder, 0.4, structure="tile", tile=tile)
    keep = mask.bool("w")
    made = tiles.plan_tiles(tiles.corners(keep, tile), (13, 21), tile, 1, torch.device("cpu"))
    truth = reference.live_weight_grad(g.double(), x.double(), keep)
    scale = reference.live_weight_grad(g.double().abs(), x.double().abs(), keep)
    peer = reference.live_weight_grad(g, x, keep)
    assert made.count == mask.count
    for found in (
        linear.Linear(False).grad_tiles(g, x, made, (13, 21)),
        ops_wgrad.tile_weight_grad(g, x, made.table, made.count, *tile, "reference"),
    ):
        check_sums(found, peer, truth, scale)


def test_bits_that_are_no_tiles_are_served_by_rows():
    model = nn.Linear(40, 32).double()
    mask = random_mask(model, 0.3, "element")
    mask.structure, mask.tile = "tile", (16, 16)
    assert tiles.corners(mask.bool("weight"), (16, 16)) is None
    check(model, mask, images(3, 40))


def test_flop_helpers():
    layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 5, 5)
    y = layer(x).sum()
    with FlopCounterMode(display=False) as counter:
        y.backward()
    assert counter.get_total_flops() == wgrad.weight_grad_flops(2 * 25, layer.weight.numel())
    assert wgrad.weight_grad_bytes(10, 4, 6, 24) == 4 * (10 * 10 + 24)


BROKEN = {
    "another row": (plan, "choice", lambda real: lambda at: real(at.roll(1)) if at.numel() > 1 else real(at)),
    "rows in another order": (
        linear.Linear,
        "grad_rows",
        lambda real: lambda *a: real(*a).flip(0),
    ),
    "channels in another order": (
        conv.Convolution,
        "grad_rows",
        lambda real: lambda *a: real(*a).flip(0),
    ),
    "a tile too far": (
        linear.Linear,
        "grad_tiles",
        lambda real: lambda self, g, x, *more: real(self, g, x.roll(1, -1), *more),
    ),
    "a channel too far": (
        conv.Convolution,
        "grad_tiles",
        lambda real: lambda self, g, x, *more: real(self, g, x.roll(1, 1), *more),
    ),
    "a bias of other rows": (
        function,
        "pick",
        lambda real: lambda t, dim, chosen: real(t.flip(0), dim, chosen) if t.dim() == 1 else real(t, dim, chosen),
    ),
    "no gradient": (function.LayerPlan, "grad_weight", lambda real: lambda *a: torch.zeros_like(real(*a))),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_the_gate_sees_a_mistake(monkeypatch, mistake):
    owner, name, broken = BROKEN[mistake]
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(2), nn.Linear(36, 11)).double()
    structure = "tile" if "far" in mistake else "row"
    mask = random_mask(model, 0.5, structure, (4, 5))
    check(model, mask, images(2, 3, 8, 8), impl="reference")
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises(AssertionError):
        check(model, mask, images(2, 3, 8, 8), impl="reference")


class Keyword(nn.Module):
    """A group norm called by keyword, above a layer that may be dead."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3).double(), nn.GroupNorm(2, 4).double()

    def forward(self, x):
        return self.n(input=self.a(x))


def test_a_group_norm_called_by_keyword():
    model, x = Keyword(), images(2, 3, 5, 5).to(memory_format=torch.channels_last)
    mask = mask_of(model, {"n.weight": True})
    dense = dense_grads(model, x)
    with pk.skip_weight_gradients(model, mask) as skip:
        check_against(skip, mask, live_grads(skip, x), dense)


def test_blocks_nest_and_are_taken_up_again():
    model, x = layers(), images(2, 3, 8, 8)
    mask = random_mask(model)
    dense = dense_grads(model, x)
    skip = pk.skip_weight_gradients(model, mask)
    skip.undo()
    for _ in range(2):
        with skip:
            with skip:
                pass
            assert skip.active, "the inner block undid the outer one"
            check_against(skip, mask, live_grads(skip, x), dense)
        assert not skip.active
        assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_the_gradient_taken_in_a_block_of_its_own(reentrant):
    model, x = layers(), images(2, 3, 8, 8).requires_grad_()
    mask = random_mask(model)
    dense = dense_grads(model, x)
    skip = pk.skip_weight_gradients(model, mask)
    with skip:
        loss = loss_of(checkpoint(model, x, use_reentrant=reentrant))
    with skip:
        loss.backward()
        check_against(skip, mask, skip.grads(), dense)
    skip.zero_grad()


def test_an_interrupted_start_leaves_nothing_behind(monkeypatch):
    model = layers()
    skip = pk.skip_weight_gradients(model, random_mask(model))
    skip.undo()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(skip, "_freeze", lambda frozen: interrupted() if frozen else None)
    with pytest.raises(KeyboardInterrupt):
        skip.__enter__()
    assert not skip.active
    assert all("forward" not in vars(m) for m in model.modules())


def test_weights_replaced_or_cast_since_are_refused():
    for change in (lambda m: m.float(), lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone()))):
        model = layers()
        skip = pk.skip_weight_gradients(model, random_mask(model))
        skip.undo()
        change(model)
        with pytest.raises(pk.PeckerKernelsError, match="anew"):
            skip.__enter__()


def test_a_compiler_sees_autocast_as_it_is():
    """Casts of the layers that follow a skipped one must not be lost in a compiled block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x, t):
            return self.c(torch.nn.functional.silu(self.a(x)) + self.b(t)[:, :, None, None])

    torch.manual_seed(0)
    model, x, t = Block(), torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    mask = random_mask(model)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        with pk.skip_weight_gradients(model, mask) as skip, torch.autocast("cpu", torch.bfloat16):
            run = torch.compile(model, backend="eager") if compiled else model
            y = run(x, t)
            assert y.dtype == torch.bfloat16
            leaves = [leaf for leaf in skip.leaves if leaf is not None]
            found.append(skip.compact(torch.autograd.grad(y.float().square().sum(), leaves)))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)
