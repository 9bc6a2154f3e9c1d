import pytest
import torch
import triton
import triton.language as tl
from kernel_gates import block_sizes
from pecker_kernels import MaskError, PeckerKernelsError, reference
from pecker_kernels.gpu import bits as kernels
from pecker_kernels.mask import bits as bitmask

RAGGED = (0, 1, 7, 8, 9, 64, 1023, 1024, 1025)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(params=block_sizes(), autouse=True)
def rows(request, monkeypatch):
    if request.param == "small blocks":
        monkeypatch.setattr(kernels, "ROWS", 16)
        monkeypatch.setattr(kernels, "POPCOUNT_BYTES", 128)


def keeps(n, device):
    generator = torch.Generator().manual_seed(n)
    yield (torch.rand(n, generator=generator) < 0.4).to(device)
    yield torch.ones(n, dtype=torch.bool, device=device)


def view_at(tensor, offset):
    """The same values `offset` elements into a larger buffer, so that addresses are not aligned."""
    buffer = torch.zeros(tensor.numel() + offset + 64, dtype=tensor.dtype, device=tensor.device)
    buffer[offset : offset + tensor.numel()] = tensor
    return buffer[offset : offset + tensor.numel()]


@pytest.mark.parametrize("n", RAGGED)
@pytest.mark.parametrize("offset", [0, 3])
def test_pack_unpack_popcount(device, poison, n, offset):
    for keep in keeps(n, device):
        bits = reference.pack_bits(keep)
        assert torch.equal(kernels.pack_bits(view_at(keep, offset)), bits)
        assert torch.equal(kernels.pack_bits(view_at(keep.to(torch.uint8) * 200, offset)), bits)
        assert torch.equal(kernels.unpack_bits(view_at(bits, offset), n), keep)
        assert kernels.popcount(view_at(bits, offset)) == int(keep.sum())


def check_apply(device, n, dtype, offset):
    for keep in keeps(n, device):
        values = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
        special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, float("-inf")], dtype=torch.float64)
        values[: min(5, n)] = special[: min(5, n)].to(dtype)
        values = values.to(device)
        ours = view_at(values, offset)
        kernels.apply_(ours, view_at(reference.pack_bits(keep), offset))
        truth = reference.apply_(values.clone(), reference.pack_bits(keep))
        assert torch.equal(ours.view(torch.uint8), truth.view(torch.uint8)), f"tensor of {n} differs"
        around = torch.as_strided(ours, (64,), (1,), offset + n)
        assert not around.view(torch.uint8).any(), "a value behind the tensor was written"


@pytest.mark.parametrize("n", RAGGED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_clears_what_is_masked_out_and_nothing_else(device, n, dtype):
    check_apply(device, n, dtype, 0)
    check_apply(device, n, dtype, 3)


def test_apply_is_seen_by_autograd(device):
    weight = torch.ones(9, device=device, requires_grad=True)
    product = (weight * weight).sum()
    with torch.no_grad():
        kernels.apply_(weight, bitmask.full_bits(9, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_public_functions_choose_triton_by_name(device):
    keep = torch.arange(77, device=device) % 3 == 0
    bits = bitmask.pack_bits(keep, impl="triton")
    assert torch.equal(bits, reference.pack_bits(keep))
    assert torch.equal(bitmask.unpack_bits(bits, 77, impl="triton"), keep)
    assert bitmask.popcount(bits, impl="triton") == 26
    values = torch.arange(77.0, device=device).view(7, 11)
    assert torch.equal(bitmask.apply_(values, bits, impl="triton").view(-1).nonzero().view(-1), keep.nonzero()[1:, 0])
    with pytest.raises(PeckerKernelsError, match="contiguous"):
        bitmask.apply_(torch.zeros(7, 11, device=device).t(), bits, impl="triton")
    with pytest.raises(MaskError, match="the mask is on"):
        kernels.apply_(values, torch.zeros(10, dtype=torch.uint8, device="meta"))


@triton.jit
def big_endian_kernel(values, bits, n, ROWS: tl.constexpr):
    at = tl.program_id(0) * ROWS * 8 + tl.arange(0, ROWS * 8)
    byte = tl.load(bits + at // 8, mask=at < n, other=0).to(tl.int32)
    tl.store(values + at, 0, mask=(at < n) & (((byte >> (7 - at % 8)) & 1) == 0))


@triton.jit
def short_kernel(values, bits, n, ROWS: tl.constexpr):
    at = tl.program_id(0) * ROWS * 8 + tl.arange(0, ROWS * 8)
    byte = tl.load(bits + at // 8, mask=at < n, other=0).to(tl.int32)
    tl.store(values + at, 0, mask=(at < n // 8 * 8) & (((byte >> (at % 8)) & 1) == 0))


@pytest.mark.parametrize("broken", [big_endian_kernel, short_kernel], ids=["bit order", "ragged end"])
def test_the_gate_sees_a_broken_kernel(device, monkeypatch, broken):
    monkeypatch.setattr(kernels, "apply_kernel", broken)
    with pytest.raises(AssertionError, match="tensor"):
        check_apply(device, 1023, torch.float32, 0)
