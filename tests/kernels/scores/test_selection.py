"""Scoring and selection: the C++ functions against torch's and plain truths, at every instruction set."""

import os

import hypothesis.strategies as st
import pecker_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from kernel_gates import check_accuracy, fill_grads, small_model
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.scores import backend as select_backend
from pecker_kernels.scores import cpu as cpu_select
from pecker_kernels.scores import threshold
from pecker_kernels.scores import torch_ops as torch_select
from pecker_kernels.scores.backend import ALL_TIES, NEGATIVE, NOT_FINITE

RAGGED = (0, 1, 15, 16, 17, 63, 64, 65, 2049)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TINY = 1e-45  # the smallest denormal


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def values(n, seed=0, dtype=torch.float32, signed=False):
    """Sizes over many octaves, ties, both zeros and denormals, one element into a larger buffer."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 12 - 8)
    kind = torch.randint(10, (n,), generator=generator)
    for at, special in enumerate((0.0, -0.0, TINY, 0.25, 0.25)):
        found[kind == at] = special
    if signed:
        found *= torch.randint(2, (n,), generator=generator) * 2 - 1
    buffer = torch.full((n + 1,), float("nan"), dtype=dtype)
    buffer[1:] = found
    return buffer[1:]


def table(dtype=torch.float32, signed=False):
    """Ragged tensors, empty ones among them, and one that is not contiguous."""
    tensors = [values(n, n, dtype, signed) for n in RAGGED]
    return [*tensors, values(600, 7, dtype, signed).view(20, 30).t()]


def same(a, b):
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_select(ops, tensors, magnitude, cut):
    truth = torch_select
    found, expected = ops.census(tensors, magnitude), truth.census(tensors, magnitude)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.faults, expected.faults)
    key = int(torch.tensor(cut).view(torch.int32))
    second, pool = ops.second_histogram(tensors, magnitude, key >> 20, int(found.counts[key >> 20]))
    assert torch.equal(second, truth.second_histogram(tensors, magnitude, key >> 20, 0)[0])
    third = truth.third_histogram(tensors, magnitude, key >> 10, None)
    assert torch.equal(ops.third_histogram(tensors, magnitude, key >> 10, pool), third)
    assert torch.equal(ops.third_histogram(tensors, magnitude, key >> 10, None), third)
    ties = ops.tie_counts(tensors, magnitude, cut)
    assert torch.equal(ties, truth.tie_counts(tensors, magnitude, cut))
    some = [n - n // 2 for n in ties.tolist()]
    for rooms in ([ALL_TIES] * len(tensors), [0] * len(tensors), some, ties.tolist(), [n + 1 for n in ties.tolist()]):
        ours, theirs = ops.keep_bits(tensors, magnitude, cut, rooms), truth.keep_bits(tensors, magnitude, cut, rooms)
        assert all(map(torch.equal, ours[0], theirs[0]))
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])
        assert ours[1].tolist() == [reference.popcount(b) for b in ours[0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_selection_passes(level, dtype, signed):
    tensors = table(dtype, signed)
    median = float(tensors[-2].abs().float().median())
    for cut in (0.0, 0.25, median, float(tensors[-2].abs().max())):
        check_select(cpu_select, tensors, signed, cut)


@pytest.mark.parametrize("n", [1_000_003])
def test_selection_passes_over_threads(level, n, two_threads):
    tensors = [values(n, 1), values(70_001, 2)]
    check_select(cpu_select, tensors, False, float(tensors[0].median()))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, TINY])
def test_all_equal(level, value, two_threads):
    tensors = [torch.full((n,), value) for n in (140_000, 5)]
    check_select(cpu_select, tensors, False, abs(value))
    for k in (1, 139_999, 140_001, 140_005):
        keep, reached = threshold.keep_top_k(tensors, k, impl="cpu")
        assert reached == float(tensors[1][0])
        assert torch.cat(keep).nonzero().view(-1).tolist() == list(range(k))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("at", [0, 16, 63, 64, 66])
def test_faults(level, dtype, at):
    for bad, fault in (
        (float("nan"), NOT_FINITE),
        (float("inf"), NOT_FINITE),
        (-float("inf"), NOT_FINITE),
        (-1.0, NEGATIVE),
        (-0.0, 0),
    ):
        tensors = [torch.ones(67, dtype=dtype) for _ in range(3)]
        tensors[1][at] = bad
        for magnitude in (False, True):
            expected = 0 if magnitude and fault == NEGATIVE else fault
            for faults in (
                cpu_select.census(tensors, magnitude).faults,
                cpu_select.keep_bits(tensors, magnitude, 0.5, [ALL_TIES] * 3)[2],
                torch_select.census(tensors, magnitude).faults,
            ):
                assert faults[0] == faults[2] == 0
                # A negative value that is not finite may be called both.
                assert int(faults[1]) & (expected or 3) == expected


@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_accumulate(level, reduction, dtype):
    shapes = [(n,) for n in RAGGED] + [(20, 30), (4, 3, 2, 2)]
    grads = [values(torch.Size(s).numel(), i, dtype, signed=True).view(s) for i, s in enumerate(shapes)]
    grads[-1] = grads[-1].to(memory_format=torch.channels_last)
    grads[4] = None
    ours = [values(torch.Size(s).numel(), i + 50, signed=reduction == "sum").view(s) for i, s in enumerate(shapes)]
    guard = [g if g is None else g.clone() for g in grads]
    theirs, plain, truth = ([s.clone() for s in ours] for _ in range(3))
    versions = [s._version for s in ours]
    found = cpu_select.accumulate_(ours, grads, reduction, True)
    torch_select.accumulate_(theirs, grads, reduction, False)
    assert torch_select.accumulate_(truth, [None] * len(truth), reduction, False) is None
    for s, t, p, g, before, old in zip(ours, theirs, plain, grads, truth, versions):
        if g is not None:
            assert s._version > old
            reference.accumulate_(p, g, reduction)
            g64 = g.float().double()
            exact = before.double() + {"sum": g64, "abs": g64.abs(), "square": g64 * g64}[reduction]
            check_accuracy(s, t, exact)
        assert same(s, p)
        assert reduction == "square" or same(s, t)
    assert all(g is None or same(g, old) for g, old in zip(grads, guard))
    expected = torch_select.census(ours, reduction == "sum")
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.faults, expected.faults)


def test_rms_and_contrast(level, two_threads):
    scores = [values(n, n, signed=True) for n in (*RAGGED, 200_003)]
    squares = [values(n, n + 1).abs() for n in (*RAGGED, 200_003)]
    sums = cpu_select.rms_sums(squares, 3)
    # Rounded roots: torch's own (MKL) are off by one unit in the last place here and there.
    roots = [(s / 3).double().sqrt().float() for s in squares]
    check = torch.stack([r.double().sum() for r in roots])
    torch.testing.assert_close(sums, check, rtol=1e-12, atol=0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for other in range(level + 1):
            cpu.set_cpu_level(other)
            assert same(cpu_select.rms_sums(squares, 3), sums), "the sum depends on threads or instructions"
    for magnitude in (False, True):
        ours, theirs = [s.clone() for s in scores], [s.clone() for s in scores]
        found = cpu_select.contrast_(ours, squares, 3, 0.0123, magnitude)
        expected = torch_select.contrast_(theirs, squares, 3, 0.0123, magnitude)
        for a, b, score, root, square in zip(ours, theirs, scores, roots, squares):
            read = score.abs() if magnitude else score
            assert same(a, read / (root + 0.0123))
            check_accuracy(a, b, read.double() / ((square.double() / 3).sqrt() + float(torch.tensor(0.0123))))
        assert torch.equal(found.faults, expected.faults)
        assert torch.equal(found.counts, torch_select.census(ours, True).counts) or not magnitude


SHAPES = ((5, 3, 2, 2), (7,), (), (64, 9), (1, 1), (130, 257), (3, 20_001), (70_001,), (9, 16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [(1, 0), (0, 0), (2, 3), (128, 128), (1, 1), (4, 8)], ids=str)
def test_blocks(level, shape, block, two_threads):
    rows, columns = select_backend.grid(shape)
    height, width = block[0] or rows, block[1] or columns
    for dtype in FLOATS:
        tensor = values(rows * columns, 3, dtype, signed=True).view(shape)
        for magnitude in (False, True):
            sums = cpu_select.block_sums(tensor, height, width, magnitude)
            truth = torch_select.block_sums(tensor.double(), height, width, magnitude)
            scale = torch_select.block_sums(tensor.double(), height, width, True)
            assert bool(((sums - truth).abs() <= 1e-12 * scale).all())
            torch.set_num_threads(1)
            cpu.set_cpu_level(0)
            assert same(cpu_select.block_sums(tensor, height, width, magnitude), sums)
            cpu.set_cpu_level(level)
            torch.set_num_threads(2)
    for density in (0.0, 0.3, 1.0):
        kept = torch.rand(sums.numel(), generator=torch.Generator().manual_seed(1)) < density
        bits = cpu_select.block_bits(kept, shape, height, width)
        assert torch.equal(bits, torch_select.block_bits(kept, shape, height, width))


@pytest.mark.parametrize("n", RAGGED)
def test_poisoned_buffers_are_written_whole_and_not_beyond(level, n):
    lib, scores, bits = cpu.library(), values(n, 3), torch.full(((n + 7) // 8 + 64,), 0xAA, dtype=torch.uint8)
    ones, faults = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8)
    arguments = cpu_select._Table([scores]).arguments
    cut, room = cpu_select._threshold_bits([scores], 0.25), cpu_select._longs([1])
    out = cpu_select._pointers([bits])
    lib.pecker_keep_bits(*arguments, False, cut, room, out, ones.data_ptr(), faults.data_ptr(), 1)
    assert torch.equal(bits[: (n + 7) // 8], torch_select.keep_bits([scores], False, 0.25, [1])[0][0])
    assert bool((bits[(n + 7) // 8 :] == 0xAA).all())
    counts, pool = torch.zeros(1024, dtype=torch.int64), torch.full((n + 64,), -1, dtype=torch.int32)
    bin_of_quarter = 0x3E800000 >> 20
    hits = lib.pecker_digit(*arguments, 10, bin_of_quarter, counts.data_ptr(), pool.data_ptr(), n // 20, 1)
    assert hits == int(counts.sum()) == int(cpu_select.census([scores], False).counts[bin_of_quarter])
    assert bool((pool[n // 20 :] == -1).all())


@st.composite
def signed_scores(draw):
    value = st.sampled_from([0.0, -0.0, TINY, -TINY, 1.0, -1.0, 0.5, 3.4028235e38]) | st.floats(-4, 4, width=32)
    tensors = [torch.tensor(draw(st.lists(value, max_size=90))) for _ in range(draw(st.integers(0, 4)))]
    tensors.append(torch.tensor([1.0]))
    return tensors, draw(st.integers(1, sum(t.numel() for t in tensors)))


def check_keep(ops, tensors, k):
    """Raw signed accumulators: the same weights as sorting |s|."""
    magnitudes = [t.abs() for t in tensors]
    bits, counts, reached = threshold.keep_bits(ops, tensors, k, magnitude=True)
    assert reached == reference.kth_largest(magnitudes, k)
    keep = [reference.unpack_bits(b, t.numel()) for b, t in zip(bits, tensors)]
    assert all(map(torch.equal, keep, reference.keep_top_k(magnitudes, k)))
    assert counts == [int(m.sum()) for m in keep]
    assert sum(counts) == k


@settings(max_examples=200, deadline=None, derandomize=True)
@given(signed_scores(), st.integers(0, 2))
def test_signed_scores_are_ranked_by_magnitude(case, at_level):
    before = cpu.cpu_level()
    cpu.set_cpu_level(min(at_level, cpu.cpu_level_max()))
    try:
        check_keep(cpu_select, *case)
        check_keep(torch_select, *case)
    finally:
        cpu.set_cpu_level(before)


def test_more_values_than_32_bits_count(two_threads):
    # The same tensor many times over: no machine needs to hold 2^31 scores.
    counts = [3 << 31, 5, 1 << 40]
    assert threshold.find_digit(counts, (1 << 40) + 5) == (1, 5)
    assert threshold.find_digit(counts, (1 << 40) + 6 + (1 << 32)) == (0, 1 + (1 << 32))
    part = torch.ones(1 << 22)
    part[-1] = 2.0
    tensors = [part] * 520
    n = part.numel() * len(tensors)
    assert n > 1 << 31
    found = cpu_select.census(tensors, False)
    assert int(found.counts.sum()) == n
    assert cpu_select._digit([part] * 520, 10, 0x3F800000 >> 20, 1024, None)[1] == n - 520
    assert int(cpu_select.tie_counts(tensors, False, 1.0).sum()) == n - 520


def test_a_threshold_is_rounded_as_torch_compares():
    for dtype in FLOATS:
        score = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]).to(dtype)}
        for cut in (0.1, 0.2, 0.30000001, 1e30):
            expected = (score["a"] >= cut).tolist()
            if any(expected):
                for impl in ("cpu", "reference"):
                    assert pk.SaliencyMask.from_scores(score, threshold=cut, impl=impl).bool("a").tolist() == expected


def scored(reduction, impl, contrast, last=True):
    model = small_model()
    scores = pk.SaliencyScores(model.named_parameters(), reduction, impl)
    retain = pk.SaliencyScores(model.named_parameters(), "square", impl)
    for i in range(3):
        fill_grads(model, seed=i)
        scores.accumulate(last=last and i == 2)
        fill_grads(model, seed=i + 9)
        retain.accumulate()
    return scores.contrast_(retain) if contrast else scores


@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_kept_census_changes_nothing_but_the_number_of_passes(monkeypatch, reduction, contrast, impl):
    scores = scored(reduction, impl, contrast)
    ops = select_backend.backend(impl)
    plain = dict(scores.named_scores())
    with monkeypatch.context() as patch:
        patch.setattr(ops, "census", None)
        masks = [pk.SaliencyMask.from_scores(scores, density=d, impl=impl) for d in (0.01, 0.4, 1.0)]
    for mask, density in zip(masks, (0.01, 0.4, 1.0)):
        again = pk.SaliencyMask.from_scores(plain, density=density, impl="reference")
        assert mask == again
        assert mask.threshold == again.threshold
        assert [mask.count_of(n) for n in mask.names] == [again.count_of(n) for n in mask.names]
    for structure in ("row", "tile", "tensor"):
        for amount in ({"density": 0.3}, {"threshold": masks[1].threshold}):
            block = {"structure": structure, "tile": (4, 8)}
            ours = pk.SaliencyMask.from_scores(scores, **amount, **block, impl=impl)
            assert ours == pk.SaliencyMask.from_scores(plain, **amount, **block, impl="reference")
            assert ours.count == sum(reference.popcount(b) for b in ours.bits.values())
    each = pk.SaliencyMask.from_scores(scores, density=0.3, scope="tensor", impl=impl)
    assert each == pk.SaliencyMask.from_scores(plain, density=0.3, scope="tensor", impl="reference")
    # Whatever writes into the scores afterwards ends the census.
    assert scores.census() is not None
    if contrast:
        scores.accumulators()[0][1].mul_(2)
    else:
        scores.accumulate()
    assert scores.census() is None


def written(score, factor, how):
    """Written into by somebody whose writes no version counter sees, as a collective's."""
    before = score._version
    if how == "data":
        score.data.mul_(factor)
    else:
        score.numpy()[...] *= factor.numpy()
    assert score._version == before


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("how", ["data", "numpy"])
@pytest.mark.parametrize("door", ["accumulators", "named_scores", "held before"])
@pytest.mark.parametrize("contrast", [False, True])
def test_scores_changed_from_outside_are_counted_anew(impl, how, door, contrast):
    reduction = "sum" if door == "accumulators" else "square"  # of "sum" named_scores are copies
    if door == "held before":
        scores = scored(reduction, impl, contrast=False, last=False)
        held = scores.accumulators()
        scores.accumulate(last=True)
    else:
        scores = scored(reduction, impl, contrast)
        held = list(getattr(scores, door)())
    assert scores.census() is not None  # lending them changes nothing
    draw = torch.Generator().manual_seed(5)
    for _, score in held:
        written(score, torch.rand(score.shape, generator=draw) * 4, how)
    assert scores.census() is None
    truth = {name: score.abs().clone() for name, score in scores.accumulators()}
    for density in (0.01, 0.4):
        mask = pk.SaliencyMask.from_scores(scores, density=density, impl=impl)
        again = pk.SaliencyMask.from_scores(truth, density=density, impl="reference")
        assert mask == again
        assert mask.threshold == again.threshold


def test_without_a_last_call_no_census_is_kept():
    scores = scored("sum", "auto", contrast=False, last=False)
    assert scores.census() is None


def break_it(monkeypatch, how):
    real = cpu_select.keep_bits

    def broken(tensors, magnitude, cut, rooms):
        if how == "ties from the wrong end":
            bits, counts, faults = real([t.flip(0) for t in tensors], magnitude, cut, rooms)
            flat = [reference.unpack_bits(b, t.numel()).flip(0) for b, t in zip(bits, tensors)]
            return [reference.pack_bits(f) for f in flat], counts, faults
        bits, counts, faults = real(tensors, magnitude, cut, rooms)
        for b in bits:
            b[-1:] = 0
        return bits, counts, faults

    monkeypatch.setattr(cpu_select, "keep_bits", broken)


@pytest.mark.parametrize("how", ["ties from the wrong end", "a dropped tail"])
def test_gates_fail_on_broken_bits(monkeypatch, how):
    tensors = [torch.tensor([1.0] * 7 + [2.0] * 70 + [1.0] * 10 + [2.0] * 4)]
    check_keep(cpu_select, tensors, 79)
    break_it(monkeypatch, how)
    with pytest.raises(AssertionError):
        check_keep(cpu_select, tensors, 79)
    with pytest.raises(AssertionError):
        check_select(cpu_select, tensors, False, 1.0)


def test_gate_fails_on_a_stale_census(monkeypatch):
    scores = scored("abs", "cpu", contrast=False)
    monkeypatch.setattr(type(scores), "census", lambda self: self._counted[0])
    scores.accumulators()[0][1].mul_(1024)
    mask = pk.SaliencyMask.from_scores(scores, density=0.5)
    assert mask.count != round(0.5 * mask.total) or mask != pk.SaliencyMask.from_scores(
        dict(scores.named_scores()), density=0.5
    )


def test_refusals():
    double = {"a": torch.rand(5, dtype=torch.float64)}
    assert pk.SaliencyMask.from_scores(double, threshold=0.0).count == 5
    with pytest.raises(pk.NativeLibraryError, match="float64"):
        pk.SaliencyMask.from_scores(double, threshold=0.0, impl="cpu")
    with pytest.raises(pk.PeckerKernelsError, match="unknown implementation"):
        pk.kth_largest(torch.ones(3), 1, impl="numpy")
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(pk.PeckerKernelsError, match="impl='triton'"):
            pk.SaliencyMask.from_scores({"a": torch.rand(5)}, density=0.5, impl="triton")


@pytest.mark.parametrize("structure", ["row", "tile"])
def test_blocks_of_a_whole_model_are_read_at_once(monkeypatch, structure):
    """Each read of a device waits for it."""
    scores = {f"t{i}": torch.rand(5 + i, 7) for i in range(6)}
    reads = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a, **k: reads.append(self.shape) or cpu(self, *a, **k))
    mask = pk.SaliencyMask.from_scores(scores, density=0.3, structure=structure, tile=(2, 3))
    assert 0 < mask.density < 1
    assert len(reads) <= 1
