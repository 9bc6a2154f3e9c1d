"""A step like the one before it: what it takes up, and what it has to see."""

import sys
from pathlib import Path

import pecker_kernels as pk
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pecker_kernels.adam import seen
from step_rig import CHANGES, check_change, fresh, give, planned_anew


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_it_comes_to_the_same_bits(impl, change, masked):
    check_change(change, impl, "cpu", masked)


@pytest.mark.parametrize("masked", [False, True])
def test_with_clipping_average_and_finite_check(masked):
    check_change("gradients turned", "cpu", "cpu", masked, clip_norm=0.5, ema=0.9, check_finite=True, weight_decay=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_a_plan_is_made_once(masked):
    assert planned_anew("cpu", "cpu", masked) == 1


def test_gradients_are_not_held():
    named, optimizer = fresh("cpu", "cpu", True)
    for step in range(3):
        give(named, step)
        optimizer.step()
    assert all(job.grad is None for plan in optimizer._plans.values() for job in plan.jobs)
    give(named, 5, leave_out=range(9))
    before = [p.detach().clone() for _, p in named]
    optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(named, before))


@pytest.mark.parametrize("change", ["gradients of another format", "an entry of the state"])
def test_the_gate_sees_a_step_that_looks_at_less(monkeypatch, change):
    def blind(self, group, state):
        return [p.grad for p in group["params"]]

    monkeypatch.setattr(seen.Seen, "still", blind)
    with pytest.raises((AssertionError, pk.PeckerKernelsError, RuntimeError)):
        check_change(change, "cpu", "cpu", False)


def test_a_sparse_gradient_is_refused_after_plain_ones():
    named, optimizer = fresh("cpu", "cpu", False)
    for step in range(2):
        give(named, step)
        optimizer.step()
    p = named[0][1]
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
