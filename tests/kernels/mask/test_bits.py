import ctypes
import os

import pecker_kernels as pk
import pytest
import torch
from kernel_gates import RAGGED
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.mask import bits as bitmask
from pecker_kernels.spec import SPECS
from pecker_kernels.torch_library import adam as ops
from torch.utils.flop_counter import FlopCounterMode

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_keep(n, seed=0, density=0.4):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density


def clustered_keep(n):
    """Long runs of ones and of zeros with a ragged border: the words that kernels treat apart."""
    keep = torch.zeros(n, dtype=torch.bool)
    keep[n // 5 : n // 2] = True
    keep[n // 2 + 1 : n // 2 + 3] = True
    return keep


def view_at(tensor, offset):
    """The same values `offset` elements into a larger buffer, so that addresses are not aligned."""
    buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    buffer[offset:] = tensor
    return buffer[offset:]


def check_apply(apply_, dtype, keep, offset):
    n = keep.numel()
    values = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    if n > 2:
        values[0], values[1], values[2] = float("nan"), -0.0, float("inf")
    bits = view_at(reference.pack_bits(keep), offset)
    ours, truth = view_at(values, offset), values.clone()
    apply_(ours, bits)
    reference.apply_(truth, bits)
    assert torch.equal(ours.view(torch.uint8), truth.view(torch.uint8))
    assert torch.equal(truth[keep].view(torch.uint8), values[keep].view(torch.uint8))
    assert not truth[~keep].view(torch.uint8).any()


@pytest.mark.parametrize("n", RAGGED)
@pytest.mark.parametrize("offset", [0, 3])
def test_pack_unpack_popcount(level, n, offset):
    for keep in (random_keep(n), clustered_keep(n), torch.ones(n, dtype=torch.bool)):
        bits = reference.pack_bits(keep)
        assert bits.numel() == (n + 7) // 8
        assert torch.equal(cpu.pack_bits(view_at(keep, offset)), bits)
        assert torch.equal(cpu.pack_bits(view_at(keep.to(torch.uint8) * 200, offset)), bits)
        assert torch.equal(cpu.unpack_bits(view_at(bits, offset), n), keep)
        assert torch.equal(reference.unpack_bits(bits, n), keep)
        assert cpu.popcount(view_at(bits, offset)) == reference.popcount(bits) == int(keep.sum())


@pytest.mark.parametrize("n", RAGGED)
def test_poisoned_buffers_are_written_whole_and_not_beyond(level, n):
    keep, lib = random_keep(n, seed=3), cpu.library()
    bits = torch.full(((n + 7) // 8 + 64,), 0xAA, dtype=torch.uint8)
    lib.pecker_pack(keep.data_ptr(), n, bits.data_ptr(), 1)
    assert torch.equal(bits[:-64], reference.pack_bits(keep))
    assert bool((bits[-64:] == 0xAA).all())
    out = torch.full((n + 64,), 0xAA, dtype=torch.uint8)
    lib.pecker_unpack(bits.data_ptr(), n, out.data_ptr(), 1)
    assert torch.equal(out[:n], keep.to(torch.uint8))
    assert bool((out[n:] == 0xAA).all())
    data = torch.full((n + 64,), float("nan"))
    assert lib.pecker_apply(data.data_ptr(), n, 4, bits.data_ptr(), 1) == 0
    assert torch.equal(data[:n].isnan(), keep)
    assert bool(data[n:].isnan().all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [n for n in RAGGED if n < 1000] + [100_003])
def test_apply(level, dtype, n):
    for offset in (0, 1):
        for keep in (random_keep(n), clustered_keep(n)):
            check_apply(cpu.apply_, dtype, keep, offset)


def test_apply_gate_fails_on_a_kernel_that_multiplies(level):
    def multiply(tensor, bits):
        tensor.mul_(reference.unpack_bits(bits, tensor.numel()))

    with pytest.raises(AssertionError):
        check_apply(multiply, torch.float32, ~random_keep(64, density=0.9), 0)
    with pytest.raises(AssertionError):
        check_apply(lambda tensor, bits: None, torch.float32, random_keep(64), 0)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_agree(threads):
    n = (1 << 23) + 77
    keep = random_keep(n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bits = cpu.pack_bits(keep)
        assert cpu.popcount(bits) == int(keep.sum())
        assert torch.equal(cpu.unpack_bits(bits, n), keep)
        data = torch.ones(n)
        cpu.apply_(data, bits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(data, keep.float())


def test_bit_order_is_least_significant_first():
    keep = torch.zeros(17, dtype=torch.bool)
    keep[[0, 3, 9, 16]] = True
    assert bitmask.pack_bits(keep).tolist() == [0b1001, 0b10, 1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_any_strides(dtype):
    t = torch.randn(6, 4, 5).to(dtype).transpose(0, 2)
    keep = random_keep(t.numel()).view(t.shape)
    expected = torch.where(keep, t, torch.zeros_like(t))
    for impl in ("auto", "reference"):
        ours = t.clone(memory_format=torch.preserve_format)
        bitmask.apply_(ours, bitmask.pack_bits(keep), impl)
        assert torch.equal(ours, expected)
    with pytest.raises(pk.NativeLibraryError, match="contiguous"):
        bitmask.apply_(t, bitmask.pack_bits(keep), "cpu")


def test_a_named_implementation_is_used_or_refused(monkeypatch):
    keep = random_keep(9)
    for impl, complaint in (("fast", "choose from"), ("triton", "takes CUDA tensors|not installed")):
        with pytest.raises(pk.PeckerKernelsError, match=complaint):
            bitmask.pack_bits(keep, impl)
    monkeypatch.setattr(cpu, "find_library", lambda: None)
    cpu.library.cache_clear()
    try:
        assert not cpu.available()
        with pytest.raises(pk.NativeLibraryError, match="not installed"):
            bitmask.pack_bits(keep, "cpu")
        assert torch.equal(bitmask.pack_bits(keep), reference.pack_bits(keep))
    finally:
        cpu.library.cache_clear()


def test_a_damaged_or_foreign_library_is_refused(monkeypatch, tmp_path):
    broken = tmp_path / cpu.LIBRARY
    broken.write_bytes(b"not a library")
    real = cpu.find_library()
    cpu.library.cache_clear()
    try:
        monkeypatch.setattr(cpu, "find_library", lambda: broken)
        with pytest.raises(pk.NativeLibraryError, match="cannot be loaded"):
            cpu.library()
        monkeypatch.setattr(cpu, "find_library", lambda: real)
        monkeypatch.setattr(cpu, "ABI_VERSION", 999)
        with pytest.raises(pk.NativeLibraryError, match="ABI version"):
            cpu.library()
    finally:
        cpu.library.cache_clear()


def test_refusals():
    bits = reference.pack_bits(random_keep(16))
    with pytest.raises(pk.MaskError, match=r"uint8 \[3\]"):
        bitmask.apply_(torch.zeros(17), bits)
    with pytest.raises(pk.MaskError, match="floating"):
        bitmask.apply_(torch.zeros(16, dtype=torch.int32), bits)
    with pytest.raises(pk.MaskError, match="bool and uint8"):
        bitmask.pack_bits(torch.zeros(3))
    with pytest.raises(pk.NativeLibraryError, match="float8"):
        cpu.apply_(torch.zeros(16, dtype=torch.float8_e4m3fn), bits)
    with pytest.raises(pk.NativeLibraryError, match="level 9"):
        cpu.set_cpu_level(9)
    assert cpu.library().pecker_set_cpu_level(ctypes.c_int(-1)) == -1


def test_autograd_sees_the_write():
    x = torch.ones(8, requires_grad=True)
    y = x * 2
    z = y * y
    bitmask.apply_(y, reference.pack_bits(random_keep(8)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_library_operations_trace_and_run():
    keep = random_keep(21)
    bits = torch.ops.pecker.pack_bits(keep)
    for op, args in (
        (ops.pack_bits, (keep,)),
        (ops.unpack_bits, (bits, 21)),
        (ops.popcount, (bits,)),
        (ops.apply_, (torch.randn(21), bits)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    assert int(torch.ops.pecker.popcount(bits)) == int(keep.sum())
    assert torch.equal(torch.ops.pecker.unpack_bits(bits, 21), keep)


@pytest.mark.parametrize("shared", [True, False])
def test_no_runtime_of_our_own(shared):
    """With torch's OpenMP its threads are used; without, no thread outlives a call. A second pool would spin on the
    cores that torch wants next."""
    library, threads = cpu.library(), torch.get_num_threads() if shared else 4
    data = torch.ones(1 << 23)
    bits = reference.pack_bits(data.exp() > 0)  # torch's own threads are up after this
    before = len(os.listdir("/proc/self/task"))
    if not shared:
        library.pecker_set_openmp(None)
    try:
        library.pecker_apply(data.data_ptr(), data.numel(), 4, bits.data_ptr(), threads)
        assert library.pecker_popcount(bits.data_ptr(), bits.numel(), threads) == 1 << 23
    finally:
        library.pecker_set_openmp(cpu.openmp_of_torch())
    assert len(os.listdir("/proc/self/task")) == before


BIT_OPERATIONS = ("pack_bits", "unpack_bits", "popcount", "apply_")


@pytest.mark.parametrize(
    ("name", "dtype", "impl"),
    # Triton's are in triton_cases.
    [(n, d, i) for n in BIT_OPERATIONS for d in SPECS[n].dtypes for i in SPECS[n].implementations if i != "triton"],
)
def test_every_implementation_in_the_specs_is_the_truth(name, dtype, impl):
    spec, keep = SPECS[name], random_keep(77)
    bits, values = reference.pack_bits(keep), torch.arange(77).to(getattr(torch, dtype))
    arguments = {"pack_bits": (values,), "unpack_bits": (bits, 77), "popcount": (bits,), "apply_": (values, bits)}[name]
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    found, truth = spec.public(*arguments, impl=impl), spec.truth(*copies)
    assert found == truth if name == "popcount" else torch.equal(found, truth)


def test_specs_describe_every_operation():
    for name, spec in SPECS.items():
        assert spec.name == name
        assert callable(spec.public)
        assert callable(spec.truth)
        assert spec.bytes_moved(1000, 0.1) > 0
        assert spec.flops(1000, 0.1) >= 0
    masked, dense = SPECS["masked_adam_"], SPECS["adam_"]
    assert masked.bytes_moved(10**6, 0.01) < dense.bytes_moved(10**6, 0.01) / 5


def test_flops_are_counted_as_the_spec_says():
    params, grads = [torch.zeros(100), torch.zeros(28)], [torch.ones(100), torch.ones(28)]
    mask = pk.SaliencyMask.random({"a": params[0], "b": params[1]}, 0.25)
    moments = [torch.zeros(mask.count_of(name)) for name in mask.names]
    with FlopCounterMode(display=False) as counter:
        pk.masked_adam_(params, grads, list(mask.bits.values()), [], moments, 1, beta1=0.0)
        torch.ops.pecker.apply_(params[0], mask.bits["a"])
    assert counter.get_total_flops() == SPECS["masked_adam_"].flops(128, 0.25)
