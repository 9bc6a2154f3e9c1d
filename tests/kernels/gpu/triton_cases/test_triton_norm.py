"""The fused norm in the interpreter (or on a GPU): against a float64 truth, in both memory orders, tiles whole and ragged."""

import pecker_kernels as pk
import pytest
import torch
from norm_rig import check_forward, check_way_back
from pecker_kernels.gpu import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((2, 6, (3, 5), 3), (1, 8, (4, 4), 2), (3, 4, (), 2), (2, 40, (7,), 4), (2, 32, (4, 8), 8))


@pytest.fixture(params=["small tiles", "as launched"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(norm, "TILE", 16)
        monkeypatch.setattr(norm, "WIDEST", 4)
        monkeypatch.setattr(norm, "MERGED", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("silu", [True, False])
def test_forward(dtype, shape, last, silu, tiles):
    check_forward(shape, dtype, last, "triton", DEVICE, silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_way_back(dtype, shape, last, tiles):
    check_way_back(shape, dtype, last, "triton", DEVICE)


def test_an_image_without_values():
    x = torch.empty(0, 4, 2, 2, device=DEVICE, requires_grad=True)
    weight, bias = torch.ones(4, device=DEVICE, requires_grad=True), torch.zeros(4, device=DEVICE, requires_grad=True)
    pk.group_norm_silu(x, weight, bias, 2, impl="triton").sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
