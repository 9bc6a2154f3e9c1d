"""Triton's step after step: only the addresses of gradients are brought up to date, and the counters move in one launch."""

import pytest
import torch
from pecker_kernels.gpu import adam_plan
from step_rig import CHANGES, check_change, fresh, give, planned_anew


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_it_comes_to_the_same_bits(change, masked, device):
    check_change(change, "triton", device, masked)


def test_a_plan_is_made_once_and_its_table_kept(device, monkeypatch):
    assert planned_anew("triton", device, True) == 1
    made = []
    renew = adam_plan._renew
    monkeypatch.setattr(adam_plan, "_renew", lambda *args: made.append(1) or renew(*args))
    named, optimizer = fresh("triton", device, True)
    for step in range(5):
        give(named, step)
        optimizer.step()
    assert made == [1]


def test_counters_are_one_tensor_and_each_its_own_number(device):
    named, optimizer = fresh("triton", device, False)
    for step in range(3):
        give(named, step)
        optimizer.step()
    counters = [optimizer.state[p]["step"] for _, p in named]
    assert [float(c) for c in counters] == [3.0] * len(counters)
    assert len({c.untyped_storage().data_ptr() for c in counters}) == 1
    kept = {key: value.clone() for key, value in optimizer.state[named[0][1]].items()}
    assert kept["step"].shape == ()


def test_gradients_that_come_back_are_read_again(device):
    """In between their places in the table were taken by others, and a look at everything was forced."""
    results = []
    for forget in (False, True):
        named, optimizer = fresh("triton", device, True)
        give(named, 0)
        first = [p.grad for _, p in named]
        optimizer.step()
        give(named, 1)
        second = [p.grad for _, p in named]
        optimizer.step()
        for (_, p), g in zip(named, first):
            p.grad = g
        optimizer._plans[0].seen = None  # all of it is looked at anew, with the first gradients in place
        if forget:
            optimizer._plans.clear()
        optimizer.step()
        results.append([p.detach().clone() for _, p in named])
        assert second
    assert all(torch.equal(a, b) for a, b in zip(*results))
