"""With a mask and no masked_grads, masked-out weights keep their bits, whatever happens around the step."""

import copy

import hypothesis.strategies as st
import pecker_kernels as pk
import pytest
import torch
from pecker_kernels.adam.lanes import Lanes
from some import counts, generated

SHAPES = {"conv": (3, 2, 3), "bias": (5,), "scalar": (), "empty": (0, 4), "wide": (2, 17)}


def bits_of(t):
    return t.detach().reshape(-1).view(torch.uint8) if t.dim() else t.detach().reshape(1).view(torch.uint8)


def make_params(seed, dtype):
    """Weights with NaN, -0.0, inf and subnormals among them: multiplying or re-writing any of them would show."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator).to(dtype)
        flat = value.view(-1)
        for i, special in enumerate((float("nan"), -0.0, float("inf"), 1e-40)):
            if flat.numel() > 4:
                flat[i] = special
        params[name] = torch.nn.Parameter(value)
    return params


def make_mask(params, structure, density, seed):
    return pk.SaliencyMask.random(params, density, structure=structure, tile=(2, 5), seed=seed)


@st.composite
def histories(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    optimizer = {
        "lr": draw(st.sampled_from([1e-6, 0.1, 10.0])),
        "betas": (draw(st.sampled_from([0.0, 0.9])), 0.99),
        "weight_decay": draw(st.sampled_from([0.0, 0.5])),
        "decoupled_weight_decay": draw(st.booleans()),
        "clip_value": draw(st.sampled_from([None, 0.1])),
        "clip_norm": draw(st.sampled_from([None, 0.5])),
        "ema": draw(st.sampled_from([None, 0.9])),
        "master": "fp32" if dtype == torch.float16 else draw(st.sampled_from([None, "fp32"])),
        "state": draw(st.sampled_from(["compact", "dense"])),
        "impl": draw(st.sampled_from(["cpu", "reference"])),
    }
    structure = draw(st.sampled_from(["element", "row", "tile", "tensor"]))
    events = draw(
        st.lists(st.sampled_from(["step", "step", "reload", "set_mask", "deepcopy", "nan"]), min_size=1, max_size=6)
    )
    return dtype, optimizer, structure, draw(st.floats(0.05, 0.9)), events, draw(st.integers(0, 10**6))


def check_invariance(dtype, options, structure, density, events, seed):
    params = make_params(seed, dtype)
    mask = make_mask(params, structure, density, seed)
    optimizer = pk.MaskedAdam(params.items(), mask, **options)
    generator = torch.Generator().manual_seed(seed)
    for i, event in enumerate(["step", *events]):
        before = {name: bits_of(p).clone() for name, p in params.items()}
        if event == "reload":
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = pk.MaskedAdam(params.items(), mask, **options)
            optimizer.load_state_dict(saved)
        elif event == "set_mask":
            mask = make_mask(params, structure, density, seed + i)
            optimizer.set_mask(mask)
        elif event == "deepcopy":
            params, optimizer = copy.deepcopy((params, optimizer))
        else:
            for name, p in params.items():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                if event == "nan":
                    p.grad.fill_(float("nan"))
                elif name == "bias" and i % 2:
                    p.grad = None
            optimizer.step()
            for name, p in params.items():
                outside = ~mask.bool(name).reshape(-1)
                size = p.element_size()
                assert torch.equal(bits_of(p).view(-1, size)[outside], before[name].view(-1, size)[outside]), name
            continue
        # Whatever is not a step writes no weight at all.
        assert all(torch.equal(bits_of(p), before[name]) for name, p in params.items())


@counts(250)
def test_masked_out_weights_keep_their_bits(count):
    generated(count, lambda history: check_invariance(*history), histories())


SETTINGS = {"lr": 0.1, "betas": (0.0, 0.99), "weight_decay": 0.5, "impl": "reference"}
BROKEN = (torch.float32, SETTINGS, "element", 0.5, ["step"], 1)


def test_the_check_passes_here_and_fails_when_the_mask_is_ignored(monkeypatch):
    check_invariance(*BROKEN)
    monkeypatch.setattr(pk.MaskedAdam, "_lanes_of", lambda self, p, name: Lanes(p.shape))
    with pytest.raises(AssertionError):
        check_invariance(*BROKEN)


def test_the_check_fails_when_a_step_multiplies_the_weights_back(monkeypatch):
    real = Lanes.scatter_

    def rewrite(self, tensor, values):
        real(self, tensor, values)
        return tensor.add_(0.0)  # keeps every value, yet turns -0.0 into +0.0

    monkeypatch.setattr(Lanes, "scatter_", rewrite)
    with pytest.raises(AssertionError):
        check_invariance(*BROKEN)


def test_the_check_fails_when_weight_decay_reaches_the_whole_tensor(monkeypatch):
    real = pk.MaskedAdam.step

    @torch.no_grad()
    def decay(self, *args, **kwargs):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pk.MaskedAdam, "step", decay)
    with pytest.raises(AssertionError):
        check_invariance(*BROKEN)
