"""Runs with an adversary: from every step, in pieces, of prompts, in the books and in the forecast."""

import json
import sys
from pathlib import Path

import pytest
import torch
from least_runs import final_files, replace_by, write_least_recipe
from safetensors.torch import load_file

from pecker_fast import cli
from pecker_fast.account.iteration import counted
from pecker_fast.recipe import idle_keys, recipe_from
from pecker_fast.records import checkpoint
from pecker_fast.records.run_folder import trajectory
from pecker_fast.runs.loop import iteration
from pecker_fast.runs.start import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_models import tiny_pipeline

ON = {"conditions": 3, "restart": 1, "starts": ["forget", "kept", "random"], "samples": 6, "steps": 2, "half_way": 0.4}


def steps_of(run):
    return [event for event in map(json.loads, (run / "run.jsonl").open()) if event["event"] == "step"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """trained(name, *overrides) -> the files that a run of the least recipe, five iterations, comes to."""
    replace_by(monkeypatch.setattr)
    recipe = write_least_recipe(tmp_path, evaluate={"every": 0, "final": 0}, steps=5, adversary=ON, distill_steps=1)

    def trained(name, *overrides):
        words = ["train", str(recipe), f"output={tmp_path / name}", "batch_size=3", "checkpoint={every: 1, keep: 100}"]
        assert cli.main([*words, "--quiet", *overrides]) == 0
        return final_files(tmp_path / name)

    return trained


def test_from_every_step_to_the_same_bits(made, tmp_path):
    want = made("whole")
    points = checkpoint.list_checkpoints(tmp_path / "whole")
    assert len(points) == 6
    pools = [load_file(point / "adversary.safetensors") for point in points[1:]]
    assert not (points[0] / "adversary.safetensors").exists()  # the first stage has none
    for name in ("images", "c"):
        assert all(torch.equal(pool[name], pools[0][name]) for pool in pools)
    assert len({pool["values"].sum().item() for pool in pools}) == len(pools)
    for point in (points[0], points[3]):
        assert made(point.name, f"resume={point}") == want, point.name
    assert made("none", "adversary.conditions=0") != want
    errors = [event.get("adversary_error") for event in steps_of(tmp_path / "whole")]
    assert errors[0] is None  # of the first stage
    assert all(error > 0 for error in errors[1:])
    assert all("adversary_error" not in event for event in steps_of(tmp_path / "none"))


def test_without_one_nothing_starts_afresh(setup):
    recipe, engine, state, _ = setup()
    state.step = recipe.adversary.restart
    assert "adversary_error" not in iteration(engine, state)


def test_the_codes_stand_in_the_forget_branch_alone(setup):
    _, engine, state, _ = setup(adversary=ON, batch_size=8)
    engine.attacks.begin(state)
    own = state.generator.num_class_embeds
    for role in ("score", "generator"):
        forget, retain = (engine.draw(state, role, branch) for branch in ("forget", "retain"))
        assert int((forget.c_g >= own).sum()) == 4
        assert int(max(retain.c_g.max(), retain.c_s.max(), forget.c_s.max(), forget.c_p.max())) < own


def test_in_pieces_the_same_vectors(setup):
    found = {}
    for micro in (0, 3):
        _, engine, state, _ = setup(adversary={**ON, "batch": 7}, engine={"micro_batch": micro}, batch_size=5)
        engine.attacks.begin(state)
        before = [p.detach().clone() for _, p in state.generator.named_parameters()]
        errors = [float(engine.attacks.step(state)["adversary_error"]) for _ in range(12)]
        assert all(
            torch.equal(p, b) and p.grad is None and p.requires_grad
            for (_, p), b in zip(state.generator.named_parameters(), before)
        )
        assert errors[-1] < 0.9 * errors[0]  # they do find what θ draws
        found[micro] = state.adversary.vectors.values
    assert torch.allclose(found[0], found[3], atol=1e-3)
    assert not torch.allclose(found[0], found[3] + 2e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["salient_only", "differentiated"])
def test_skipped_weight_gradients_change_nothing(setup, rule):
    weights = {}
    for skip in (True, False):
        mask = {"structure": "row", "skip": skip}
        _, engine, state, _ = setup(
            density=0.2, structure="row", mask=mask, adversary=ON, update_rule=rule, optimizer={"eps": 1.0}, lr=1e-2
        )
        engine.attacks.begin(state)
        start = [p.detach().clone() for _, p in state.generator.named_parameters()]
        for _ in range(2):
            iteration(engine, state)
        weights[skip] = [p.detach() - before for (_, p), before in zip(state.generator.named_parameters(), start)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(weights[True], weights[False]))
    assert any(float(w.abs().max()) > 1e-4 for w in weights[True])


def test_the_books_count_the_attack_and_leave_the_vectors_alone(setup):
    accounts = {}
    for count in (0, 3):
        _, engine, state, _ = setup(adversary={**ON, "conditions": count})
        engine.attacks.begin(state)
        engine.attacks.step(state)
        before = None if not count else {name: t.clone() for name, t in state.adversary.tensors().items()}
        accounts[count] = counted(engine, state)
        assert before is None or all(torch.equal(t, before[name]) for name, t in state.adversary.tensors().items())
    assert "adversary" not in accounts[0]["parts"]
    attack = accounts[3]["parts"]["adversary"]["flops"]
    forward = accounts[3]["parts"]["score_samples"]["flops"] / 2  # of both branches
    assert 2 * 1.5 * forward < attack < 2 * 3 * forward  # two steps, forward and back to the vectors
    assert accounts[3]["counted_flops"] == accounts[0]["counted_flops"] + attack


def test_a_recipe_without_one_is_the_run_it_was():
    there = trajectory(recipe_from({}))
    assert "adversary" not in there
    assert "exclude" not in there["mask"]
    idle = recipe_from({"adversary": {"rate": 0.5}})
    assert trajectory(idle) == there
    assert idle_keys(idle) == ["adversary.rate has no effect with adversary.conditions=0"]
    attacked = [trajectory(recipe_from({"adversary": {"conditions": 1, **more}})) for more in ({}, {"half_way": 0.2})]
    assert attacked[0]["adversary"]["conditions"] == 1
    assert "half_way" not in attacked[0]["adversary"]  # as in runs that were started before there was such a key
    assert attacked[1]["adversary"]["half_way"] == 0.2


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_soft_tokens_attack_prompts(tmp_path, monkeypatch, kind):
    replace_by(monkeypatch.setattr)
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)
    model = tiny_pipeline(tmp_path / "model", kind)
    captions = ["a red circle on the left", "a photo of the blue circle", "small circle"]
    recipe = recipe_from({
        "model": str(model), "forget": {"concept": "circle", "captions": captions}, "cover": "square",
        "retain": ["a red square", "green star"], "batch_size": 4, "steps": 3, "timesteps": {"init": 625, "min": 20, "max": 980},
        "mask": {"samples": 4, "density": 0.1}, "guidance": {"score_train": 2.0, "score": 2.0, "teacher": 2.0, "text_dropout": 0.5},
        "evaluate": {"every": 0, "final": 0, "teacher_steps": 1}, "output": str(tmp_path / "run"),
        "adversary": {**ON, "tokens": 2, "share": 0.6},
    })  # fmt: skip
    train(recipe, quiet=True)
    state = load_file(checkpoint.list_checkpoints(tmp_path / "run")[-1] / "adversary.safetensors")
    assert state["values"].shape[:2] == (3, 2)
    assert all(event["adversary_error"] > 0 for event in steps_of(tmp_path / "run"))
