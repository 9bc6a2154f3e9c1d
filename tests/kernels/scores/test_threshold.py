import socket

import hypothesis.strategies as st
import pecker_kernels as pk
import pytest
import torch
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.scores import backend as select_backend
from pecker_kernels.scores import sampling, threshold
from pecker_kernels.scores import torch_ops as torch_select
from some import counts, generated

SPECIAL = [0.0, -0.0, 1e-45, 1.17549435e-38, 1.0, 1.0000001, 0.5, 3.4028235e38]


@st.composite
def scores(draw):
    """A few tensors of non-negative values with many ties, subnormals and the largest float among them."""
    value = st.sampled_from(SPECIAL) | st.floats(0, 3.4028234663852886e38, width=32)
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        values = draw(st.lists(value, max_size=40))
        tensors.append(torch.tensor(values, dtype=torch.float32))
    total = sum(t.numel() for t in tensors)
    if total == 0:
        tensors.append(torch.tensor([1.0]))
        total = 1
    return tensors, draw(st.integers(1, total))


IMPLS = ["reference"] + ["cpu"] * cpu.available()


def check_exact(tensors, k, impls=IMPLS):
    expected = reference.kth_largest(tensors, k)
    for impl in impls:
        assert pk.kth_largest(tensors, k, impl=impl) == expected
        keep, reached = threshold.keep_top_k(tensors, k, impl=impl)
        assert reached == expected
        assert sum(int(m.sum()) for m in keep) == k
        assert all(torch.equal(a, b) for a, b in zip(keep, reference.keep_top_k(tensors, k)))


@counts(300)
def test_exact_against_sort(count):
    generated(count, lambda case: check_exact(*case), scores())


@pytest.mark.parametrize("k", [1, 2, 5000, 123_456, 199_999, 200_000])
def test_exact_over_chunks(monkeypatch, k):
    monkeypatch.setattr(torch_select, "CHUNK", 1 << 12)
    generator = torch.Generator().manual_seed(k)
    values = torch.randn(200_000, generator=generator).abs()
    values[::3] = values[0]
    check_exact([values[:70_000].view(100, 700), values[70_000:70_001], values[70_001:]], k)


@pytest.fixture
def sampled(monkeypatch):
    """Every selection of the reference begins with a sample. Returns what the samples said: "few", "equal" or "missed"."""
    monkeypatch.setattr(torch_select, "SAMPLED_FROM", 1)
    said, find = [], sampling.find

    def told(*arguments):
        found = find(*arguments)
        said.append("few" if found.tensors is not None else "equal" if found.equal is not None else "missed")
        return found

    monkeypatch.setattr(sampling, "find", told)
    return said


@counts(300)
def test_exact_by_a_sample(count, sampled):
    generated(count, lambda case: check_exact(*case, ["reference"]), scores())
    assert sampled


def many(kind, n=120_000):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).abs()
    return {
        "spread": x,
        "sorted": x.sort().values,
        "equal": torch.full((n,), 0.3),
        "two": (x < 0.5).float(),
        "one bucket": 1 + x * 2.0**-12,
        "striped": torch.where(torch.arange(n) % 4096 < 64, x + 9, x),
        "bfloat16": x.bfloat16(),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("spread", {"few"}),
        ("sorted", {"few"}),
        ("equal", {"equal"}),
        ("two", {"equal", "missed"}),
        ("one bucket", {"few"}),
        ("striped", {"few"}),
        ("bfloat16", {"few"}),
    ],
)
def test_what_a_sample_says_of_hostile_scores(sampled, kind, expected):
    values = many(kind)
    border = int((values > 0.5).sum()) if kind == "two" else 1000  # there both values are bounds, and most are between
    for k in (border, len(values) // 2):
        check_exact([values[:50_001], values[50_001:]], k, ["reference"])
    assert set(sampled) == expected
    for k in (1, len(values)):
        check_exact([values[:50_001], values[50_001:]], k, ["reference"])


@pytest.mark.parametrize("broken", ["bounds too high", "bounds too low", "no room"])
def test_a_sample_that_misses_changes_nothing(monkeypatch, sampled, broken):
    if broken == "no room":
        monkeypatch.setattr(sampling, "POOL_SHARE", 0.0)
        monkeypatch.setattr(sampling, "POOL_LEAST", 1)
    else:
        keys = [0x7F000000, 0x7F7FFFFF] if broken == "bounds too high" else [0, 1]
        monkeypatch.setattr(sampling, "_bounds", lambda *_: torch.tensor(keys, dtype=torch.int32))
    check_exact([many("spread")], 1000, ["reference"])
    assert set(sampled) == {"missed"}


def test_bounds_hold_the_wanted_key_and_little_else():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        whole = torch.rand(100_000, generator=generator)
        share = float(torch.rand((), generator=generator)) ** 3
        keys = whole[torch.randperm(len(whole), generator=generator)[:8000]].view(torch.int32)
        wanted = whole.sort(descending=True).values[max(round(share * len(whole)) - 1, 0)].view(torch.int32)
        lower, upper = sampling._bounds(torch.cat([keys, torch.full((500,), -1, dtype=torch.int32)]), share).tolist()
        assert lower <= int(wanted) <= upper
        between = ((whole.view(torch.int32) >= lower) & (whole.view(torch.int32) <= upper)).float().mean()
        assert between < 2.5 * sampling.DEVIATIONS * (share * (1 - share) / 8000) ** 0.5 + 30 / 8000


def test_gate_fails_on_a_sample_that_is_counted_wrong(monkeypatch, sampled):
    real = torch_select.bracket

    def one_too_many(*arguments):
        above, *rest = real(*arguments)
        return above + 1, *rest

    monkeypatch.setattr(torch_select, "bracket", one_too_many)
    with pytest.raises(AssertionError):
        check_exact([many("spread")], 1000, ["reference"])


def test_faults_are_found_by_a_sample_too(sampled):
    for value, says in ((float("nan"), "'b' hold NaN or inf"), (-1.0, "'b' hold negative")):
        with pytest.raises(pk.ScoreError, match=says):
            threshold.select([torch.ones(3), torch.tensor([1.0, value])], 1, names=["a", "b"], impl="reference")
    for k in (0, 4, True):
        with pytest.raises(pk.PeckerKernelsError, match="from 1 to"):
            pk.kth_largest(torch.ones(3), k, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_scores(dtype):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_exact([values[:400], values[400:]], 333)


def test_strides_do_not_change_the_order_of_ties():
    t = torch.ones(4, 6).t()
    keep, _ = threshold.keep_top_k([t], 7)
    assert keep[0].reshape(-1).nonzero().view(-1).tolist() == list(range(7))


def test_ties_take_the_lowest_index_over_tensors():
    keep, reached = threshold.keep_top_k([torch.zeros(5), torch.tensor([0.0, 2.0]), torch.zeros(3)], 4)
    assert reached == 0.0
    assert [m.tolist() for m in keep] == [[True, True, True, False, False], [False, True], [False] * 3]


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    with pytest.raises(pk.ScoreError, match="'second' hold NaN or inf"):
        threshold.select([torch.ones(3), torch.tensor([1.0, bad])], 1, names=["first", "second"])


def test_refusals():
    with pytest.raises(pk.ScoreError, match="tensor 0 hold negative"):
        pk.kth_largest([torch.tensor([1.0, -1e-30])], 1)
    for k in (0, 4, -1, 1.0, True):
        with pytest.raises(pk.PeckerKernelsError, match="from 1 to"):
            pk.kth_largest(torch.ones(3), k)
    with pytest.raises(pk.PeckerKernelsError, match="float64"):
        pk.kth_largest(torch.ones(3, dtype=torch.float64), 1)
    with pytest.raises(pk.PeckerKernelsError, match="from 1 to"):
        pk.kth_largest([], 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("digit", ["second", "third"])
def test_gate_fails_on_a_histogram_off_by_one_bin(monkeypatch, impl, digit):
    ops = select_backend.backend(impl)
    real = getattr(ops, f"{digit}_histogram")

    def off_by_one(*args):
        found = real(*args)
        return (found[0].roll(1), found[1]) if digit == "second" else found.roll(1)

    monkeypatch.setattr(ops, f"{digit}_histogram", off_by_one)
    with pytest.raises(AssertionError):
        check_exact([torch.rand(100, generator=torch.Generator().manual_seed(0))], 30, [impl])


def test_gate_fails_on_ties_from_the_wrong_end(monkeypatch):
    real = threshold._ties_before
    monkeypatch.setattr(threshold, "_ties_before", lambda ties, *rest: real(ties[::-1], *rest)[::-1])
    with pytest.raises(AssertionError):
        check_exact([torch.zeros(5), torch.zeros(5)], 3)


def _rank(rank, port, results, sampled):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    whole = torch.rand(1001, generator=torch.Generator().manual_seed(5))
    whole[100:900:2] = 0.25
    group = torch.distributed.group.WORLD
    mine = {"a": whole[:300], "b": whole[300:500]} if rank == 0 else {"c": whole[500:]}
    if sampled:
        torch_select.SAMPLED_FROM = 1
    impl = "reference" if sampled else "auto"
    out = [pk.SaliencyMask.from_scores(mine, density=d, group=group, impl=impl) for d in (0.02, 0.6, 1.0)]
    # The same weights dealt out in stripes, with explicit offsets.
    pieces = list(range(rank, 11, 2))
    striped = threshold.keep_top_k(
        [whole[i * 91 : (i + 1) * 91] for i in pieces], 601, group, offsets=[i * 91 for i in pieces], impl=impl
    )
    results.put(
        (
            rank,
            [(m.threshold, {n: m.bool(n).tolist() for n in m.names}) for m in out],
            [(i, m.tolist()) for i, m in zip(pieces, striped[0])],
        )
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True], ids=["radix", "sample"])
def test_exact_over_two_ranks(sampled):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, port, results, sampled)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(results.get() for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    whole = torch.rand(1001, generator=torch.Generator().manual_seed(5))
    whole[100:900:2] = 0.25
    for i, density in enumerate((0.02, 0.6, 1.0)):
        alone = pk.SaliencyMask.from_scores({"all": whole}, density=density)
        keep = found[0][1][i][1]["a"] + found[0][1][i][1]["b"] + found[1][1][i][1]["c"]
        assert keep == alone.bool("all").tolist()
        assert {found[rank][1][i][0] for rank in (0, 1)} == {alone.threshold}
    stripes = dict(found[0][2] + found[1][2])
    assert [v for i in range(11) for v in stripes[i]] == reference.keep_top_k([whole], 601)[0].tolist()
