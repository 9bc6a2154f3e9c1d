"""Figures are of one piece: equal samples and seeds in every row, kept beside the run's own, and no more said than they show."""

import json

import pytest
import torch
from tiny_models import write_tiny_model

from pecker_fast import cli
from pecker_fast.runs import training as training_module
from pecker_fast.runs.finished import evaluate_run, export_run
from pecker_fast.runs.judging import EVALUATION_SEED, BaseJudging
from pecker_fast.runs.start import train


def events(run, name):
    return [e for e in map(json.loads, (run / "run.jsonl").read_text().splitlines()) if e["event"] == name]


def title(folder):
    return (folder / "README.md").read_text().split("\n# ")[1].splitlines()[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, for those that only look."""
    from tiny_models import TINY_KEYS

    from pecker_fast.recipe import recipe_from

    folder = tmp_path_factory.mktemp("figures")
    model = write_tiny_model(folder / "model")
    recipe = recipe_from({**TINY_KEYS, "steps": 2, "model": str(model), "output": str(folder / "run")})
    return train(recipe, quiet=True).run_dir


def test_every_row_tells_its_samples_seed_and_intervals(done):
    metrics = json.loads((done / "metrics.json").read_text())
    for row in ("before", "after", "teacher"):
        assert (metrics[row]["samples"], metrics[row]["seed"]) == (12, EVALUATION_SEED)
        low, high = metrics[row]["intervals"]["ua"]
        assert low <= metrics[row]["ua"] <= high
        assert set(metrics[row]["intervals"]["per_class"]) == set(metrics[row]["per_class"])
    assert metrics["forget_steps"] == 2
    assert all("per_class" not in e["intervals"] for e in events(done, "evaluate"))


def test_rows_of_other_samples_seed_or_judge_are_blank_with_the_reason(done, tmp_path):
    recorded = json.loads((done / "metrics.json").read_text())
    same = evaluate_run(done)
    assert (same["before"], same["after"], same["teacher"]) == tuple(
        recorded[k] for k in ("before", "after", "teacher")
    )
    assert same["blank"] == {}
    for given, why in (({"samples": 13}, "of 12 samples"), ({"seed": 3}, "with seed 1000003")):
        found = evaluate_run(done, **given)
        assert found["before"] is found["teacher"] is None
        assert why in found["blank"]["before"]
        assert "--all" in found["blank"]["teacher"]
    other = write_tiny_model(tmp_path / "other", seed=5) / "judge"
    assert "another judge" in evaluate_run(done, judge=other)["blank"]["before"]


def test_all_draws_every_row_alike(done):
    found = evaluate_run(done, samples=14, seed=3, everything=True)
    assert [(found[k]["samples"], found[k]["seed"]) for k in ("before", "after", "teacher")] == [(14, 3)] * 3
    again = evaluate_run(done, everything=True)
    recorded = json.loads((done / "metrics.json").read_text())
    assert (again["before"], again["teacher"]) == (recorded["before"], recorded["teacher"])


def test_the_command_keeps_what_it_found_and_leaves_the_runs_own(done, tmp_path, capsys):
    own = (done / "metrics.json").read_bytes()
    target = tmp_path / "f.json"
    for seed in ("4", "5"):
        assert cli.main(["evaluate", str(done), "--seed", seed, "--json", str(target), "--keep"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "before: the run has it of 12 samples with seed 1000003" in printed
    assert f"figures: {target}" in printed
    assert json.loads(target.read_text())["after"]["seed"] == 5
    lines = [json.loads(line) for line in (done / "evaluations.jsonl").read_text().splitlines()]
    assert [line["after"]["seed"] for line in lines] == [4, 5]
    assert (done / "metrics.json").read_bytes() == own
    assert cli.main(["evaluate", str(done), "--json", str(tmp_path / "no" / "f.json")]) == 2
    assert cli.main(["evaluate", str(done), "--all", "--protocol", "classes"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_run_resumed_for_other_samples_has_equal_rows(tiny_recipe):
    train(tiny_recipe(steps=2), quiet=True)
    metrics = train(tiny_recipe(steps=2, evaluate={"final": 16}), quiet=True).metrics
    assert [metrics[k]["samples"] for k in ("before", "after", "teacher")] == [16, 16, 16]


def test_the_card_says_no_more_than_was_seen(done, tiny_recipe, tmp_path):
    assert title(done / "pipeline").startswith(
        "One-step generator that was trained to forget class 0 (class 1 is drawn"
    )
    assert "; the judge still sees it in" in title(done / "pipeline")
    bare = train(tiny_recipe(steps=2, evaluate={"every": 0, "final": 0}, output=str(tmp_path / "bare")), quiet=True)
    assert title(bare.run_dir / "pipeline").endswith("(not judged)")
    none = train(tiny_recipe(steps=0, output=str(tmp_path / "none")), quiet=True).run_dir
    assert title(none / "pipeline").endswith("(0 steps)")
    assert title(export_run(none, tmp_path / "again")).endswith("(0 steps)")
    assert "Nothing was trained to be forgotten (0 steps)" in (none / "report.html").read_text()


def test_the_card_and_the_page_say_forgotten_where_it_was_judged_so(tiny_recipe, tmp_path, monkeypatch):
    """The judge is told what to find: class 0 before, class 1 after."""
    from pecker_fast.runs.judging import Judging

    figures = Judging.figures

    def found(self, sampler, samples, seed=EVALUATION_SEED):
        row = figures(self, sampler, samples, seed)
        found.calls += 1
        ua = 0.0 if found.calls == 1 else 1.0
        return row | {"ua": ua, "intervals": {"ua": [max(0.0, ua - 0.01), ua]}}

    found.calls = 0
    monkeypatch.setattr(Judging, "figures", found)
    run = train(tiny_recipe(steps=1, evaluate={"every": 0}), quiet=True).run_dir
    assert title(run / "pipeline") == "One-step generator that has forgotten class 0 (class 1 is drawn in its place)"
    assert "| ua | 0 (0 … 0) | 1 (0.99 … 1) |" in (run / "pipeline" / "README.md").read_text()
    assert (
        "Judged forgotten: UA 100.0 % (99.0–100.0 %) of 12 samples, 0.0 % before" in (run / "report.html").read_text()
    )


def test_a_judge_that_its_teacher_fails_is_told_once_before_training(tiny_recipe, monkeypatch):
    told = []
    monkeypatch.setattr("pecker_fast.records.events.Tracker.say", lambda self, text: told.append(text))
    run = train(tiny_recipe(steps=2), quiet=True).run_dir
    (judged,) = events(run, "judge")
    assert judged["samples"] == 12
    assert judged["doubts"].startswith("the judge sees what was asked for in only")
    assert f"warning: {judged['doubts']}" in told
    before = [e["event"] for e in map(json.loads, (run / "run.jsonl").read_text().splitlines())]
    assert before.index("judge") < before.index("step")
    train(tiny_recipe(steps=4), quiet=True)  # goes on, and does not ask again
    assert len(events(run, "judge")) == 1


@pytest.mark.slow
def test_asking_the_judge_changes_no_weight_and_is_left_out_where_nothing_is_judged(tiny_recipe, tmp_path, monkeypatch):
    def weights(run):
        return (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    asked = train(tiny_recipe(steps=2, output=str(tmp_path / "asked")), quiet=True).run_dir
    silent = train(tiny_recipe(steps=2, evaluate={"every": 0, "final": 0}, output=str(tmp_path / "silent")), quiet=True)
    assert events(silent.run_dir, "judge") == []
    monkeypatch.setattr(training_module.Training, "try_judge", lambda self: None)
    plain = train(tiny_recipe(steps=2, output=str(tmp_path / "plain")), quiet=True).run_dir
    assert weights(asked) == weights(plain) == weights(silent.run_dir)


@pytest.mark.parametrize(
    ("row", "doubted"),
    [
        ({"ua": 0.02, "retain_accuracy": 0.97}, ()),
        ({"ua": 0.02, "retain_accuracy": 0.32}, ("32.0 %", "retain samples")),
        ({"ua": 0.70, "retain_accuracy": 0.97}, ("30.0 %", "forget samples")),
        ({"ua": 0.70, "retain_accuracy": 0.32}, ("forget samples and 32.0 %",)),
        ({"ua": 0.1, "retain_accuracy": 0.75}, ()),  # of 48 samples it may be more than 80 %
        ({"ua": None, "retain_accuracy": None}, ()),
    ],
)
def test_doubts(row, doubted):
    found = BaseJudging.doubts(None, row | {"samples": 48})
    assert (found is not None) == bool(doubted)
    for text in doubted:
        assert text in found


def test_text_runs_are_asked_alike(tmp_path):
    """The shapes model and its judge of words agree; the same judge before noise does not."""
    from pecker_fast.loading import load_model
    from pecker_fast.recipe import load_recipe
    from pecker_fast.runs.prompt_judging import PromptJudging

    recipe = load_recipe("shapes")
    judging = PromptJudging(recipe, load_model(recipe))
    shape = judging.parts.text.pixels

    def noise(rows, seed):
        return torch.rand(len(rows), 3, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    assert "the judge sees what was asked for in only" in judging.doubts(judging.shares(noise, 24))
