"""What is a weight, in every dtype that weights come in: infinity of a short dtype is one, whatever the limit looks like there."""

import pytest
import torch

from pecker_fast.engine.finite import STEEPEST, are_gradients
from pecker_fast.networks import are_weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn)
BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_none(dtype):
    good = torch.tensor([0.0, -3.0, 200.0]).to(dtype)
    assert are_weights(good)
    assert are_weights(good[:0])
    for value in BAD:
        bad = torch.tensor([0.0, value, 1.0]).to(dtype)
        assert bool(bad.float().isfinite().all()) or not are_weights(bad), value  # e4m3fn has no infinity
        if dtype.itemsize > 1:
            assert not are_gradients([good, None, bad]), value
    if dtype.itemsize > 1:
        assert are_gradients([good, None, good[:0]])


def test_numbers_that_no_network_has():
    assert not are_weights(torch.tensor([1e21]))
    assert are_weights(torch.tensor([1e21]), largest=1e37)
    assert not are_gradients([torch.tensor([-2 * STEEPEST])])
