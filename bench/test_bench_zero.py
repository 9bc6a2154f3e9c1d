"""One update of θ over two ranks: bytes sent, counted against the formula of docs/scaling.md, and time.

    pytest bench/test_bench_zero.py --benchmark-json=bench/results/zero.json

Dense: DeepSpeed's reduction, a step of MaskedAdam on the partition, DeepSpeed's gathering. Masked: `salient_only`, which on
stages 1 and 2 moves salient values alone. What one rank sends is the same on a wire of any speed; the time is of two processes
on one machine.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from zero_ranks import WORLD, Plan, Ranks

SCALE = os.environ.get("BENCH_SCALE", "full")
ROUNDS = 2 if SCALE == "tiny" else 10
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


def formula(plan: Plan, weights: int, world: int = WORLD) -> float:
    """Bytes a rank sends for one update of `weights` float32 weights; padding comes on top."""
    share = (world - 1) / world
    if plan.density is not None and plan.stage < 3:
        return 2 * 4 * weights * plan.density * share  # gradients and new weights, both salient alone
    if plan.stage == 3:
        return (
            (4 + 4) * weights * share
        )  # gathered for the way back, gradients scattered; what a forward pass gathers is its own
    return (2 * 4 + 4) * weights * share  # DeepSpeed all-reduces its buckets, then gathers new weights


@pytest.mark.parametrize("density", [None, 0.5, 0.1, 0.01], ids=["dense", "0.5", "0.1", "0.01"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_update(benchmark, stage, density):
    plan = Plan(stage, density, SCALE)
    ranks = Ranks(plan)
    try:
        ranks.do("update")
        sent = ranks.do("count")
        expected = formula(plan, ranks.weights)
        slack = 0.02 if SCALE == "full" else 0.15  # padding of partitions, and of each tensor in stage 3
        assert expected <= sum(sent.values()) * (1 + 1e-3) <= expected * (1 + slack) + 2, (sent, expected)
        benchmark.pedantic(ranks.do, args=("update",), rounds=ROUNDS, warmup_rounds=1)
    finally:
        ranks.close()
    benchmark.extra_info.update(weights=ranks.weights, sent_bytes=sent, formula_bytes=expected)
