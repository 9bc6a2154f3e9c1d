"""θ and ψ over ranks against one process: the same masks to the bit, the same weights to rounding."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from zero_cases import (
    TEXT,
    broken,
    first_gradient,
    held_bytes,
    non_finite,
    outside,
    resume,
    train_and_save,
    train_each,
    train_once,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
STEPS = 20
CLOSE = 1e-7  # for weights below 1; above, one unit in the last place

ADVERSARY = {
    "adversary": {
        "conditions": 3,
        "restart": 4,
        "starts": ["forget", "kept", "random"],
        "samples": 12,
        "half_way": 0.3,
    },
    "mask": {"exclude": ["class_embedding.*"]},
}
MANY_STEPS = {"images": {"samples": 10, "steps": 2}}
CASES = {
    "1-differentiated": (1, {"update_rule": "differentiated"}),
    "2-salient_only-offload": (2, {"update_rule": "salient_only", "engine": {"offload": "cpu"}}),
    "3-alternating": (3, {"update_rule": "alternating"}),
}
RULES = {
    "differentiated": {"update_rule": "differentiated"},
    "salient_only": {"update_rule": "salient_only"},
    "alternating": {"update_rule": "alternating"},
    "sfd": {"method": "sfd"},
    "contrast": {"mask": {"score": "forget_loss", "contrast": True, "structure": "row"}},
    "adversary": {"update_rule": "differentiated", **ADVERSARY},
    "micro": {"update_rule": "differentiated", "engine": {"micro_batch": 1}},
    "spare": {"method": "spare", **MANY_STEPS},
    "salun": {"method": "salun", "update_rule": "differentiated", **MANY_STEPS},
    "esd": {
        "method": "esd",
        "images": {"source": "trajectory", "steps": 3},
        "mask": {"source": "none"},
        "weights": {"retain": 1},
    },
    "rows": {"update_rule": "salient_only", "mask": {"structure": "row", "density": 0.2}, "engine": {"micro_batch": 1}},
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
    """(keys, model) -> what one process comes to, made once."""
    made = {}

    def of(keys, model=tiny_model):
        keys = {key: value for key, value in keys.items() if key != "engine"}
        at = repr((keys, model))
        if at not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            made[at] = train_once(0, model, keys, 0, STEPS)
            torch.set_num_threads(threads)
        return made[at]

    return of


def check(world, zero, keys, model, alone):
    check_outcomes(run_ranks(world, train_once, model, keys, zero, STEPS), alone(keys, model))


def check_outcomes(results, expected):
    """What the ranks came to against what one process does."""
    for result in results:
        assert result["mask"] == expected["mask"]
        assert result["images"] == expected["images"]
        for name, loss in expected["losses"].items():
            # a difference of guided predictions: cancellation leaves fewer digits than the weights have
            assert result["losses"][name] == pytest.approx(loss, rel=1e-3, abs=1e-4)
    assert [result["weights"] is None for result in results] == [False, *[True] * (len(results) - 1)]
    for result in results if expected["vectors"] is not None else ():
        assert torch.equal(result["vectors"], results[0]["vectors"])
        assert torch.allclose(result["vectors"], expected["vectors"], rtol=0, atol=1e-4)
    worst, _ = differences(results[0]["weights"], expected["weights"])
    assert worst <= 1, f"{worst:.2f} × what rounding allows"


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c[0] != "2" else c for c in CASES])
def test_two_ranks_train_what_one_process_trains(case, tiny_model, alone):
    zero, keys = CASES[case]
    many = {"spare": {**keys, **RULES["spare"]}, "salun": {**keys, **RULES["salun"]}}
    cases = {"plain": keys, "adversary": {**keys, **ADVERSARY}, **many}
    results = run_ranks(2, train_each, tiny_model, cases, zero, STEPS)
    for name, keys in cases.items():
        check_outcomes([result[name] for result in results], alone(keys))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_whole_matrix(zero, offload, world, tiny_model, alone):
    chosen = (
        list(RULES)[:4] if (zero, world) == (3, 4) else RULES
    )  # a gathering for every module, four processes on two cores
    cases = {name: {**RULES[name], "engine": {**RULES[name].get("engine", {}), "offload": offload}} for name in chosen}
    results = run_ranks(world, train_each, tiny_model, cases, zero, STEPS)
    for name in cases:
        check_outcomes([result[name] for result in results], alone(RULES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("recipe", ["digits", "shapes"])
def test_the_shipped_recipes(recipe, zero, alone):
    check(2, zero, {}, recipe, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "kind", "keys"),
    [
        (1, "sd1", {"update_rule": "salient_only"}),
        (2, "sd2", {"engine": {"offload": "cpu"}}),
        (3, "sdxl", {"engine": {"shard_teacher": True}}),
        (2, "sd1", {"score": "lora"}),
        (3, "sd1", {"engine": {"checkpointing": True, "micro_batch": 2}, "update_rule": "alternating"}),
    ],
)
def test_text_to_image(zero, kind, keys, alone, tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tiny_text_models import tiny_pipeline

    model = tiny_pipeline(tmp_path_factory.mktemp("text") / kind, kind)
    check(2, zero, {**TEXT, **keys}, model, alone)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_gradient_through_the_frozen_score_network_is_torchs(zero, tiny_model):
    keys = {"method": "sfd"}
    torch.set_num_threads(1)
    _, expected, none = first_gradient(0, tiny_model, keys, 0)
    results = run_ranks(2, first_gradient, tiny_model, keys, zero)
    found = sum(vector for _, vector, _ in results)
    assert none == 0
    assert all(stray == 0 for *_, stray in results)  # ψ has none of its own
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unmasked", "merged_first", "summed"])
def test_the_gate_sees_a_broken_engine(how, tiny_model, alone):
    keys = {"update_rule": "differentiated"}
    results = run_ranks(2, broken, tiny_model, keys, 1, STEPS, how)
    worst, _ = differences(results[0]["weights"], alone(keys)["weights"])
    assert worst > 10


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_at_the_usual_eps_losses_agree(zero, tiny_model, alone):
    keys = {"optimizer": {"eps": 1e-8}}
    expected = alone(keys)
    result = run_ranks(2, train_once, tiny_model, keys, zero, STEPS)[0]
    worst, share = differences(result["weights"], expected["weights"])
    print(f"stage {zero}: {share:.1%} of the weights differ, at most {worst:.3g} × what rounding allows")
    for name, loss in expected["losses"].items():
        assert result["losses"][name] == pytest.approx(loss, rel=1e-2)


def check_resume(before, after, zero, other, cases, tiny_model, alone, folder):
    run_ranks(before, train_and_save, tiny_model, cases, zero, STEPS // 2, folder)
    results = run_ranks(after, resume, tiny_model, cases, other, STEPS, folder)
    for name, keys in cases.items():
        check_outcomes([result[name] for result in results], alone(keys))


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_goes_on_with_two_and_another_stage(tiny_model, alone, tmp_path):
    cases = {"moment": {"update_rule": "salient_only", "optimizer": {"betas": [0.5, 0.999]}}}
    check_resume(1, 2, 2, 3, cases, tiny_model, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(before, after, tiny_model, alone, tmp_path):
    zero = 1 + (before + after) % 3
    cases = {name: RULES[name] for name in ("differentiated", "salient_only", "alternating")}
    check_resume(before, after, zero, zero, cases, tiny_model, alone, tmp_path)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_salient_only_leaves_everything_else_alone_on_every_rank(zero, tiny_model):
    keys = {"update_rule": "salient_only", "optimizer": {"weight_decay": 0.1}, "lr": 1e-2}
    digests = {digest for pair in run_ranks(2, outside, tiny_model, keys, zero, 5) for digest in pair}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("zero", "which", "rule"),
    [
        pytest.param(2, "score", "differentiated", marks=pytest.mark.slow),
        pytest.param(1, "generator", "salient_only", marks=pytest.mark.slow),
        pytest.param(3, "generator", "salient_only", marks=pytest.mark.slow),
        pytest.param(2, "generator", "alternating", marks=pytest.mark.slow),
    ],
)
def test_a_nan_on_one_rank_stops_all_and_names_it(zero, which, rule, tiny_model):
    first, second = run_ranks(2, non_finite, tiny_model, {"update_rule": rule}, zero, which)
    assert first[0] == second[0]
    assert "forget step 1, rank" in first[0]
    assert f"{'score network' if which == 'score' else 'generator'} tensor" in first[0]
    assert (first[1], second[1]) == (False, True)
    assert first[2]
    assert second[2]


@pytest.mark.slow
@pytest.mark.parametrize("density", [pytest.param(1.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_holds_what_the_formula_says(zero, density, tiny_model):
    """docs/scaling.md: 4N (stage 3: 4N/W) + 4N/W parameters, 4Nd/W moments with β₁ = 0, 4N/W average, N/8 mask; a step is
    handed 4Nd/W of gradients, on stage 3 4N/W."""
    keys = {"update_rule": "salient_only", "mask": {"density": density}}
    ranks = run_ranks(2, held_bytes, tiny_model, keys, zero)
    n, w, pad = 18_649, 2, 4 * 300  # padding: of the partition's end, in stage 3 of every tensor
    for held in ranks:
        assert held["parameters"] == pytest.approx((4 * n / w if zero == 3 else 4 * n) + 4 * n / w, abs=2 * pad)
        assert held["average"] == pytest.approx(4 * n / w, abs=pad)
        assert held["mask"] == pytest.approx(n / 8, abs=100)
    handed = 4 * n * (1 if zero == 3 else density)
    assert sum(held["gradients"] for held in ranks) == pytest.approx(handed, abs=2 * pad if handed == 4 * n else 8)
    assert sum(held["moments"] for held in ranks) == pytest.approx(4 * n * density, abs=2 * pad if density == 1 else 8)
