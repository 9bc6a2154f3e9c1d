"""θ and ψ over ranks against one process: the same masks to the bit, the same weights to rounding."""

import pytest
import torch
from ranks import run_ranks
from zero_cases import train_once

from pecker_fast.ranks import ALONE

pytest.importorskip("deepspeed")
STEPS = 20
CLOSE = 1e-7  # for weights below 1; above, one unit in the last place

CASES = {
    "1-differentiated": (1, {"update_rule": "differentiated"}),
    "2-salient_only-offload": (2, {"update_rule": "salient_only", "engine": {"offload": "cpu"}}),
    "3-alternating": (3, {"update_rule": "alternating"}),
}
MATRIX = {
    f"{zero}-{rule}-{offload}": (zero, {**keys, "engine": {**keys.get("engine", {}), "offload": offload}})
    for zero in (1, 2, 3)
    for offload in ("none", "cpu")
    for rule, keys in {
        "differentiated": {"update_rule": "differentiated"},
        "salient_only": {"update_rule": "salient_only"},
        "alternating": {"update_rule": "alternating"},
        "sfd": {"method": "sfd"},
        "contrast": {"mask": {"score": "forget_loss", "contrast": True, "structure": "row"}},
        "micro": {"update_rule": "differentiated", "engine": {"micro_batch": 1}},
    }.items()
}


def differences(weights, others):
    """(largest difference in units of what a weight allows, share of weights that differ)."""
    worst, count, total = 0.0, 0, 0
    for name, w in others.items():
        allowed = torch.maximum(torch.full_like(w, CLOSE), torch.finfo(w.dtype).eps * w.abs())
        difference = (weights[name] - w).abs()
        worst = max(worst, float((difference / allowed).max()))
        count += int((difference != 0).sum())
        total += w.numel()
    return worst, count / total


@pytest.fixture(scope="module")
def alone(tiny_model):
    """(keys) -> what one process comes to, made once."""
    made = {}

    def of(keys, steps=STEPS):
        keys = {key: value for key, value in keys.items() if key != "engine"}
        if repr((keys, steps)) not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            made[repr((keys, steps))] = train_once(0, tiny_model, keys, 0, steps)
            torch.set_num_threads(threads)
        return made[repr((keys, steps))]

    return of


def check(world, zero, keys, tiny_model, alone):
    expected = alone(keys)
    results = run_ranks(world, train_once, tiny_model, keys, zero, STEPS)
    for result in results:
        assert result["mask"] == expected["mask"]
        assert result["images"] == expected["images"]
        for name, loss in expected["losses"].items():
            assert result["losses"][name] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert [result["weights"] is None for result in results] == [False, *[True] * (world - 1)]
    worst, _ = differences(results[0]["weights"], expected["weights"])
    assert worst <= 1, f"{worst:.2f} × what rounding allows"
    return results[0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_trains(case, tiny_model, alone):
    check(2, *CASES[case], tiny_model, alone)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", MATRIX)
def test_the_whole_matrix(case, world, tiny_model, alone):
    check(world, *MATRIX[case], tiny_model, alone)
