"""Tensors of more than 2**31 values, on a GPU alone: every index has to be computed in 64 bits."""

import pytest
import torch
from pecker_kernels.gpu import bits, select
from pecker_kernels.scores.backend import ALL_TIES

N = 2**31 + 4099


@pytest.fixture(autouse=True)
def roomy():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def marks():
    """Positions on both sides of every border that 32 bits could break."""
    return torch.tensor([0, 2**28 + 1, 2**29, 2**30 + 5, 2**31 - 1, 2**31, 2**31 + 4095, N - 1], device="cuda")


def test_bits():
    keep = torch.zeros(N, dtype=torch.bool, device="cuda")
    keep[marks()] = True
    packed = bits.pack_bits(keep)
    assert bits.popcount(packed) == len(marks())
    assert torch.equal(bits.unpack_bits(packed, N), keep)
    values = torch.ones(N, dtype=torch.float16, device="cuda")
    bits.apply_(values, packed)
    assert int(values.count_nonzero()) == len(marks())
    assert bool((values[marks()] == 1).all())


def test_selection():
    scores = torch.full((N,), 0.25, dtype=torch.bfloat16, device="cuda")
    scores[marks()] = 2.0
    census = select.census([scores], False)
    assert int(census.counts.sum()) == N
    assert int(census.counts.max()) == N - len(marks())
    packed, counts, faults = select.keep_bits([scores], False, 0.25, [N - len(marks()) - 1])
    assert counts.tolist() == [N - 1]
    assert faults.tolist() == [0]
    kept = bits.unpack_bits(packed[0], N)
    # The last value is a mark; the last tie stands before it.
    assert not kept[N - 2]
    assert int(kept.sum()) == N - 1
    packed, counts, _ = select.keep_bits([scores], False, 1.0, [ALL_TIES])
    assert counts.tolist() == [len(marks())]
    assert bool(bits.unpack_bits(packed[0], N)[marks()].all())


def test_accumulation():
    scores = torch.zeros(N, dtype=torch.float32, device="cuda")
    grad = torch.zeros(N, dtype=torch.bfloat16, device="cuda")
    grad[marks()] = -3.0
    found = select.accumulate_([scores], [grad], "square", True)
    assert int(scores.count_nonzero()) == len(marks())
    assert bool((scores[marks()] == 9).all())
    assert int(found.counts[0]) == N - len(marks())
