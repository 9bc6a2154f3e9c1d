"""NaN, ±infinity and absurd numbers × loss, gradient, weight, state × rank × step: the run stops, names it, saves nothing of it."""

import pytest
from bad_numbers import CASES, meet
from ranks import run_ranks


def check(found, cases, rank=None):
    assert [outcome["case"] for outcome in found] == sorted(cases, key=lambda case: case[2])
    for outcome in found:
        (_, place, step), said = outcome["case"], outcome["said"]
        at = {f"forget step {step}", f"forget step {step + 1}"}  # met in the iteration, or when it is to be saved
        assert any(said.startswith(where) for where in at), outcome
        assert "tensor " in said, outcome
        assert "checkpoints are as they were" in said, outcome
        assert ", rank " in said or rank is None, outcome
        assert outcome["disk"], outcome
        if place in ("loss", "gradient"):
            assert outcome["weights"], outcome


@pytest.mark.slow
def test_one_process(tiny_model, tmp_path):
    check(meet(0, tiny_model, 0, tmp_path, CASES, 0), CASES)
    print(f"bad numbers: {len(CASES)} of {len(CASES)} stopped, nothing saved")


EVERYWHERE = [case for case in CASES if case[2] == 1]


@pytest.mark.parametrize(
    ("bad", "cases"),
    [
        (1, EVERYWHERE),
        pytest.param(0, CASES, marks=pytest.mark.slow),
        pytest.param(1, CASES, marks=pytest.mark.slow),
    ],
)
def test_one_of_two_ranks(bad, cases, tiny_model, tmp_path):
    first, second = run_ranks(2, meet, tiny_model, 2, tmp_path, cases, bad)
    check(first, cases, bad)
    assert [outcome["said"] for outcome in second] == [outcome["said"] for outcome in first]
    assert all(outcome["weights"] for outcome in second if outcome["case"][1] in ("loss", "gradient"))
    print(f"bad numbers on rank {bad}: {len(cases)} of {len(cases)} stopped on both, nothing saved")
