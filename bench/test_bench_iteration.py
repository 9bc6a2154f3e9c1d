"""One whole iteration on the digits: the engine against the loops of bench/baselines.py, in one process.

    make bench

All draw their samples inside; batch and networks are the same. A baseline is timed only if it takes the engine's step.
"""

from __future__ import annotations

import os

import pytest
from baselines import BASELINES, RULES, step_difference

from pecker_fast.recipe import load_recipe
from pecker_fast.runs.benchmark import Setup, set_up

TINY = os.environ.get("BENCH_SCALE", "full") == "tiny"
KEYS = ["output=runs/bench", "mask.samples=256", *(["batch_size=2", "mask.samples=4"] if TINY else [])]
ENGINE = ("dense", "differentiated", "salient_only", "alternating")
VARIANTS = {"rows 0.1": ("mask.structure=row", "mask.density=0.1"), "bf16": ("precision=bf16",)}
TOLERANCE = 2e-3
ROUNDS, WARM_UP = (1, 1) if TINY else (30, 5)


def start(rule: str, *overrides: str) -> Setup:
    keys = ["mask.source=none"] if rule == "dense" else [f"update_rule={rule}"]
    return set_up(load_recipe("digits_plain", [*KEYS, *keys, *overrides]))


@pytest.mark.parametrize("rule", ENGINE)
def test_engine(benchmark, rule):
    benchmark.pedantic(start(rule).iterate, rounds=ROUNDS, warmup_rounds=WARM_UP)


@pytest.mark.parametrize("rule", ENGINE[1:])
@pytest.mark.parametrize("kind", VARIANTS)
def test_engine_variants(benchmark, kind, rule):
    benchmark.pedantic(start(rule, *VARIANTS[kind]).iterate, rounds=ROUNDS, warmup_rounds=WARM_UP)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BASELINES)
def test_baseline(benchmark, name, rule):
    smooth = (start(rule, "optimizer.eps=1.0") for _ in range(2))
    found = step_difference(next(smooth), BASELINES[name](next(smooth), rule))
    if max(found.values()) > TOLERANCE:
        pytest.fail(f"not timed, it takes another step than the engine: {found}", pytrace=False)
    benchmark.pedantic(BASELINES[name](start(rule), rule), rounds=ROUNDS, warmup_rounds=WARM_UP)
