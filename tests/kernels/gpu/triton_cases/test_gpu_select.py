"""gpu/select.py against torch_select, the backend in plain torch: the same bits, counts and faults."""

import pecker_kernels as pk
import pytest
import torch
import triton
import triton.language as tl
from kernel_gates import block_sizes, check_accuracy, fill_grads, small_model
from pecker_kernels import PeckerKernelsError
from pecker_kernels.gpu import blocks, bracket, keep, saliency, select, table, threshold
from pecker_kernels.scores import torch_ops as torch_select
from pecker_kernels.scores.backend import ALL_TIES

SIZES = (0, 1, 7, 8, 9, 511, 512, 1025)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=block_sizes(), autouse=True)
def block_size(request, monkeypatch):
    """Small: many blocks per tensor, several rounds in every histogram, hardly any single additions."""
    if request.param == "small blocks":
        for module in (threshold, saliency, keep, blocks, bracket):
            monkeypatch.setattr(module, "BLOCK", 256)
        monkeypatch.setattr(torch_select, "SAMPLE_BLOCK", 256)
        monkeypatch.setattr(bracket, "REGIONS", 4)
        monkeypatch.setattr(threshold, "WINDOW", 32)
        monkeypatch.setattr(threshold, "REPLICAS", 3)


def scores_like(kind, device, dtype=torch.float32, sizes=SIZES, seed=0):
    """Non-negative scores, or signed ones for kinds that say so."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in sizes:
        x = torch.randn(n, generator=generator).abs()
        if kind == "spread":
            x = 10.0 ** (torch.rand(n, generator=generator) * 60 - 42)
        elif kind == "equal":
            x = torch.full((n,), 0.37)
        elif kind == "zero":
            x = torch.zeros(n)
            x[::3] = -0.0
        elif kind == "few":
            x = torch.randint(0, 4, (n,), generator=generator) / 8
        elif kind == "denormal":
            x = torch.randint(0, 9, (n,), generator=generator, dtype=torch.int32).view(torch.float32)
        elif kind == "one bin":
            x = 1 + torch.rand(n, generator=generator) / 8
        out.append(x.to(dtype).to(device))
    return out


KINDS = ("normal", "spread", "equal", "zero", "few", "denormal", "one bin")


def test_scores_changed_from_outside_are_counted_anew(device):
    model = small_model().to(device)
    scores = pk.SaliencyScores(model.named_parameters(), "sum", "triton")
    fill_grads(model, seed=0)
    scores.accumulate(last=True)
    draw = torch.Generator().manual_seed(5)
    for _, score in scores.accumulators():
        score.data.mul_((torch.rand(score.shape, generator=draw) * 4).to(device))  # moves no version
    mask = pk.SaliencyMask.from_scores(scores, density=0.3, impl="triton")
    assert mask == pk.SaliencyMask.from_scores(dict(scores.named_scores()), density=0.3, impl="reference")


def shifted(tensors, offset):
    """The same values `offset` elements into larger buffers: addresses that are no multiple of 16."""
    out = []
    for t in tensors:
        buffer = torch.full((t.numel() + 2 * offset + 8,), 7.0, dtype=t.dtype, device=t.device)
        buffer[offset : offset + t.numel()] = t
        out.append(buffer[offset : offset + t.numel()])
    return out


def same_census(ours, truth):
    assert torch.equal(ours.counts.cpu(), truth.counts.cpu())
    assert torch.equal(ours.faults.cpu(), truth.faults.cpu())
    assert ours.counts.dtype == truth.counts.dtype
    assert ours.faults.dtype == truth.faults.dtype


def check_histograms(tensors, magnitude):
    first = torch_select.census(tensors, magnitude)
    same_census(select.census(tensors, magnitude), first)
    for prefix in {int(first.counts.argmax()), int(first.counts.nonzero().max())}:
        expected = int(first.counts[prefix])
        second = torch_select.second_histogram(tensors, magnitude, prefix, expected)[0]
        found, pool = select.second_histogram(tensors, magnitude, prefix, expected)
        assert torch.equal(found, second)
        longer = (prefix << 10) | int(second.argmax())
        third = torch_select.third_histogram(tensors, magnitude, longer, None)
        assert torch.equal(select.third_histogram(tensors, magnitude, longer, pool), third)
        assert torch.equal(select.third_histogram(tensors, magnitude, longer, None), third)


@pytest.mark.parametrize("kind", KINDS)
def test_histograms(device, poison, kind):
    check_histograms(scores_like(kind, device), False)


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["no pool", "pool"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_of_signed_scores_at_any_address(device, poison, monkeypatch, dtype, share):
    monkeypatch.setattr(threshold, "POOL_SHARE", share)
    tensors = [t * (1 - 2 * (torch.arange(t.numel(), device=device) % 2)) for t in scores_like("normal", device, dtype)]
    check_histograms([*shifted(tensors, 3), tensors[6].reshape(16, 32).t()], True)


def test_histograms_of_mixed_dtypes(device):
    check_histograms([t for dtype in DTYPES for t in scores_like("spread", device, dtype, (65, 700))], False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(device, poison, dtype):
    tensors = [*scores_like("normal", device, dtype), *shifted(scores_like("normal", device, dtype, (900,), 1), 3)]
    for per in (1, 4, 256):
        ours, truth = select.sample(tensors, per), torch_select.sample(tensors, per)
        assert torch.equal(ours, truth)
        assert (truth >= 0).any()


def check_bracket(tensors, magnitude, capacity, ends=(0.6, 0.3)):
    """ends: shares of the values that reach the bounds."""
    keys = torch.cat([t.detach().reshape(-1).float() for t in tensors]).view(torch.int32) & 0x7FFFFFFF
    bounds = keys.sort(descending=True).values[[int(len(keys) * share) for share in ends]]
    above, filled, pool, faults = select.bracket(tensors, magnitude, bounds, capacity)
    inside = keys[(keys >= bounds[0]) & (keys <= bounds[1])].sort().values
    assert int(above) == int((keys > bounds[1]).sum())
    assert int(filled.sum()) == len(inside)
    assert torch.equal(faults, torch_select.bracket(tensors, magnitude, bounds, len(keys))[3])
    held = [pool[i, : min(n, pool.shape[1])] for i, n in enumerate(filled.tolist())]
    if all(n <= pool.shape[1] for n in filled.tolist()):
        assert torch.equal(torch.cat(held).sort().values, inside)
    else:
        assert torch.isin(torch.cat(held), inside).all()
    return [len(h) for h in held]


@pytest.mark.parametrize("kind", KINDS)
def test_brackets(device, poison, kind):
    check_bracket(scores_like(kind, device), False, 4000 * bracket.REGIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_brackets_of_signed_scores_at_any_address_in_a_pool_too_small(device, poison, dtype):
    tensors = [t * (1 - 2 * (torch.arange(t.numel(), device=device) % 2)) for t in scores_like("normal", device, dtype)]
    held = check_bracket([*shifted(tensors, 3), tensors[6].reshape(16, 32).t()], True, 8 * bracket.REGIONS)
    assert max(held) == 8


def one_more_above(arguments):
    arguments[3].add_(1)


def one_key_astray(arguments):
    arguments[5].view(-1)[:1].add_(1 << 24)


@pytest.mark.parametrize("magnitude", [False, True])
def test_faults_name_the_tensor(device, magnitude):
    bad = {1: float("nan"), 2: float("inf"), 3: -1.0, 4: -float("inf"), 5: -0.0, 6: -1e-45, 7: -float("nan")}
    tensors = scores_like("normal", device, sizes=[600] * 9)
    for i, value in bad.items():
        tensors[i][599 - i] = value
    ours, truth = select.census(tensors, magnitude), torch_select.census(tensors, magnitude)
    finite = (truth.faults & 1) == 0
    seen = select.bracket(tensors, magnitude, torch.tensor([5, 9], dtype=torch.int32, device=device), 99)[3]
    for found in (ours.faults, seen):
        assert torch.equal(found[finite], truth.faults[finite])
        assert torch.equal(found & 1, truth.faults & 1)
    assert torch.equal(ours.faults & 1, truth.faults & 1)
    assert torch.equal(ours.faults[finite], truth.faults[finite])
    cut = 0.5
    kept = select.keep_bits(tensors, magnitude, cut, [ALL_TIES] * 9)
    expected = torch_select.keep_bits(tensors, magnitude, cut, [ALL_TIES] * 9)
    assert all(torch.equal(a, b) for a, b in zip(kept[0], expected[0]))
    assert torch.equal(kept[2] & 1, expected[2] & 1)
    assert torch.equal(kept[2][finite], expected[2][finite])


def check_keep(tensors):
    cut = float(torch.cat([t.float() for t in tensors]).median())
    ties = torch_select.tie_counts(tensors, False, cut)
    assert torch.equal(select.tie_counts(tensors, False, cut), ties)
    n = len(tensors)
    for rooms in (
        [ALL_TIES] * n,
        [0] * n,
        [int(c) // 2 for c in ties],
        [ALL_TIES, 0, 1, 2, 3, 500, 0, int(ties[7]), 9],
    ):
        ours, truth = select.keep_bits(tensors, False, cut, rooms), torch_select.keep_bits(tensors, False, cut, rooms)
        assert all(torch.equal(a, b) for a, b in zip(ours[0], truth[0]))
        assert torch.equal(ours[1], truth[1])
        assert torch.equal(ours[2], truth[2])


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), *(("few", dtype) for dtype in DTYPES[1:])], ids=str
)
def test_keep_bits_and_ties(device, poison, kind, dtype):
    check_keep([*scores_like(kind, device, dtype), *shifted(scores_like(kind, device, dtype, (1000,)), 3)])


def test_keep_bits_of_signed_scores_and_a_threshold_between_numbers(device):
    tensors = [torch.linspace(-2, 2, 999, dtype=dtype, device=device) for dtype in DTYPES]
    for magnitude in (False, True):
        for cut in (0.0, 0.3, 1e-45, 1e9):
            ours = select.keep_bits(tensors, magnitude, cut, [ALL_TIES, 3, 0])
            truth = torch_select.keep_bits(tensors, magnitude, cut, [ALL_TIES, 3, 0])
            assert all(torch.equal(a, b) for a, b in zip(ours[0], truth[0]))
            assert torch.equal(
                select.tie_counts(tensors, magnitude, cut), torch_select.tie_counts(tensors, magnitude, cut)
            )


def check_accumulate(device, reduction, dtype, offset):
    start = scores_like("normal", device)
    grads = [(g - 0.5).to(dtype) for g in scores_like("spread", device, seed=1)]
    grads = [g * 10.0 ** -(i % 3) for i, g in enumerate(grads)]
    grads[4] = None
    ours, peer = shifted(start, offset), [t.clone() for t in start]
    torch_select.accumulate_(peer, grads, reduction, False)
    given = [None if g is None else shifted([g], offset)[0] for g in grads]
    found = select.accumulate_(ours, given, reduction, census=offset == 0)
    if offset == 0:
        same_census(found, torch_select.census(ours, reduction == "sum"))
    else:
        assert found is None
    for s, grad, a, b in zip(start, grads, ours, peer):
        if grad is None:
            assert torch.equal(a, s)
            continue
        g = grad.float().double()
        truth = s.double() + {"sum": g, "abs": g.abs(), "square": g * g}[reduction]
        fits = truth.abs() < 3e38
        check_accuracy(a[fits], b[fits], truth[fits])


@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_accumulate(device, poison, reduction, dtype):
    check_accumulate(device, reduction, dtype, 0)
    check_accumulate(device, reduction, dtype, 1)


@pytest.mark.parametrize("magnitude", [False, True])
def test_contrast_and_rms(device, poison, magnitude):
    signed = [t - 1.0 if magnitude else t for t in scores_like("normal", device)]
    squares = scores_like("spread", device, seed=2)
    sums = select.rms_sums(squares, 7)
    assert sums.dtype == torch.float64
    assert torch.allclose(sums, torch_select.rms_sums(squares, 7), rtol=1e-6, atol=0)
    assert torch.equal(sums, select.rms_sums(shifted(squares, 1), 7))
    for offset in (0, 1):
        ours, peer = shifted(signed, offset), [t.clone() for t in signed]
        found = select.contrast_(ours, squares, 7, 0.01, magnitude)
        torch_select.contrast_(peer, squares, 7, 0.01, magnitude)
        same_census(found, torch_select.census(ours, magnitude))
        for s, q, a, b in zip(signed, squares, ours, peer):
            score = s.double().abs() if magnitude else s.double()
            check_accuracy(a, b, score / ((q.double() / 7).sqrt() + torch.tensor(0.01).double().to(device)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in ((), (5,), (3, 7), (37, 13, 3), (65, 9), (1, 299))),
        *(((19, 33), dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_blocks(device, poison, shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    rows, columns = (shape[0] if shape else 1), tensor.numel() // (shape[0] if shape else 1)
    for height, width in ((1, columns), (128, 128), (7, 24), (rows, columns), (1, 1)):
        for magnitude in (False, True):
            truth = torch_select.block_sums(tensor, height, width, magnitude)
            ours = select.block_sums(tensor, height, width, magnitude)
            assert ours.dtype == torch.float64
            assert torch.allclose(ours, truth, rtol=1e-12, atol=1e-12)
        kept = torch.arange(len(truth), device=device) % 3 == 0
        bits = select.block_bits(kept, shape, height, width)
        assert torch.equal(bits, torch_select.block_bits(kept, shape, height, width))


@triton.jit
def start_kernel(chunks, out, n, BLOCK: tl.constexpr):
    tensor, start = table.block_start(chunks, BLOCK)
    tl.store(out, start)
    tl.store(out + 1, tensor)
    tl.store(out + 2, table.values_left(start, n, BLOCK))


def test_positions_beyond_int32(device):
    chunks = torch.tensor([[3, 2_000_000]], dtype=torch.int32, device=device)
    out = torch.zeros(3, dtype=torch.int64, device=device)
    start_kernel[(1,)](chunks, out, 2_000_000 * 4096 + 7, 4096)
    assert out.tolist() == [2_000_000 * 4096, 3, 7]


@pytest.mark.parametrize(
    ("reduction", "sampled"), [("sum", False), ("abs", False), ("square", False), ("sum", True), ("abs", True)]
)
def test_masks_of_a_model_are_those_of_the_reference(device, monkeypatch, reduction, sampled):
    masks = []
    monkeypatch.undo()  # blocks as launched, in the interpreter too
    if sampled:
        monkeypatch.setattr(select, "SAMPLED_FROM", 1)
        monkeypatch.setattr(select, "census", only_of_pools(select.census))
    for impl in ("triton", "reference"):
        model = small_model().to(device)
        scores = pk.SaliencyScores(model.named_parameters(), reduction, impl)
        for i in range(2):
            for name, g in fill_grads(model, i).items():
                model.get_parameter(name).grad = g.to(device)
            scores.accumulate(last=i == 1)
        masks += [
            pk.SaliencyMask.from_scores(scores, density=0.3, structure=structure, tile=(4, 8), impl=impl)
            for structure in ("element", "row", "tile")
        ]
    for ours, truth in zip(masks[:3], masks[3:]):
        assert ours == truth
        assert 0.25 < ours.density < 0.6


def only_of_pools(census):
    """No first pass over all scores where a sample did."""

    def checked(tensors, magnitude):
        assert len(tensors) == bracket.REGIONS
        return census(tensors, magnitude)

    return checked


class Spoiled:
    """A kernel whose result is changed after each launch."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            if self.kernel is not None:
                self.kernel[grid](*arguments, **options)
            self.change(arguments)

        return launch


def shift_bins(arguments):
    arguments[2].copy_(arguments[2].roll(1, dims=-1))


def one_tie_less(arguments):
    arguments[2].sub_(1)


@pytest.mark.parametrize(
    ("module", "name", "change", "check"),
    [
        (threshold, "census_kernel", shift_bins, lambda device: check_histograms(scores_like("few", device), False)),
        (threshold, "digits_kernel", shift_bins, lambda device: check_histograms(scores_like("few", device), False)),
        (
            bracket,
            "bracket_kernel",
            one_more_above,
            lambda device: check_bracket(scores_like("normal", device), False, 9999),
        ),
        (
            bracket,
            "bracket_kernel",
            one_key_astray,
            lambda device: check_bracket(scores_like("normal", device), False, 99999),
        ),
        (keep, "ties_kernel", one_tie_less, lambda device: check_keep(scores_like("few", device))),
        (saliency, "accumulate_kernel", None, lambda device: check_accumulate(device, "abs", torch.float32, 0)),
    ],
    ids=["first histogram", "digit", "above", "pool", "ties", "accumulate that does nothing"],
)
def test_the_gates_see_a_broken_kernel(device, monkeypatch, module, name, change, check):
    check(device)
    right = getattr(module, name)
    monkeypatch.setattr(module, name, Spoiled(None, lambda _: None) if change is None else Spoiled(right, change))
    with pytest.raises(AssertionError):
        check(device)


def test_empty_lists_and_tensors(device):
    for tensors in ([], [torch.zeros(0, device=device)]):
        n = len(tensors)
        assert int(select.census(tensors, False).counts.sum()) == 0
        assert int(select.accumulate_(tensors, [None] * n, "abs", True).counts.sum()) == 0
        assert int(select.contrast_(tensors, tensors, 1, 0.1, False).counts.sum()) == 0
        assert select.rms_sums(tensors, 1).tolist() == [0.0] * n
        assert select.sample(tensors, 4).tolist() == []
        assert int(select.bracket(tensors, False, torch.zeros(2, dtype=torch.int32), 9)[1].sum()) == 0
        assert int(select.second_histogram(tensors, False, 5, 0)[0].sum()) == 0
        assert int(select.third_histogram(tensors, False, 5, None).sum()) == 0
        assert select.tie_counts(tensors, False, 0.5).tolist() == [0] * n
        assert select.keep_bits(tensors, False, 0.5, [0] * n)[1].tolist() == [0] * n
    with pytest.raises(PeckerKernelsError, match="float64"):
        select.census([torch.zeros(3, dtype=torch.float64, device=device)], False)


def test_tables_are_kept_until_an_address_changes(device):
    tensors = scores_like("normal", device)
    first, again = table.table([tensors], 64), table.table([tensors], 64)
    assert first.rows is again.rows
    assert first.chunks is again.chunks
    assert first.aligned
    moved = table.table([shifted(tensors, 1)], 64)
    assert moved.rows is not first.rows
    assert moved.chunks is first.chunks
    assert not moved.aligned
