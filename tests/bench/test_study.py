"""The study compares what it says: arms, halving, outcomes, intervals, tables; what is done is not done again."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from evidence import plan, report, stages, trial  # noqa: E402
from evidence.outcome import bootstrap, interval, outcome_of, paired  # noqa: E402
from evidence.plan import Arm, Config  # noqa: E402

QUICK = Config(1e-4, 1e-3, 1.0, 2)


def test_the_grid_is_the_screened_and_the_skipped_cells():
    grid = len(plan.SCORES) * len(plan.STRUCTURES) * len(plan.DENSITIES) * len(plan.RULES)
    screened = [arm for arm in plan.screened() if arm.score != "none"]
    assert len(screened) + len(plan.skipped()) == grid
    assert plan.NONE in plan.screened()
    assert plan.PAPER in plan.screened()
    for arm in screened:  # nothing structured is screened without its control
        assert arm.twin() in plan.screened(), arm.name


def test_every_arm_has_the_same_budget_and_names_of_its_own():
    names = [arm.name for arm in plan.screened()]
    assert len(set(names)) == len(names)
    assert plan.RUNGS[0][1] == len(plan.CONFIGS)
    assert len(plan.neighbours(plan.CONFIGS[0])) + 1 == 5


@pytest.mark.parametrize("arm", [plan.NONE, plan.PAPER, Arm("forget_loss+", "row", 0.1, "salient_only")])
def test_recipe_says_what_the_arm_is(arm):
    recipe = trial.recipe_of(arm, QUICK, (3, 8), 7)
    assert (recipe.forget, recipe.cover, recipe.seed) == (3, 8, 7)
    assert recipe.lr.generator == QUICK.lr
    assert recipe.lr.score == QUICK.lr_score
    if arm.score == "none":
        assert not recipe.uses_mask
    else:
        assert recipe.mask.structure == arm.structure
        assert recipe.update_rule == arm.rule
        assert recipe.mask.contrast == arm.score.endswith("+")


def test_mask_is_the_one_a_run_would_make():
    """Shared scores must not change the mask."""
    from pecker_fast.forgetting import SaliencyPass
    from pecker_fast.loading.parts import load_parts

    trial._scores.cache_clear()
    arm = Arm("forget_loss+", "row", 0.1, "salient_only", samples=96)
    recipe = trial.recipe_of(arm, QUICK, (0, 1), 0)
    parts = load_parts(recipe)
    mask = SaliencyPass(recipe, parts.teacher, parts.score, parts.generator, parts.conditions).mask()
    shared = trial.mask_of(recipe, arm, (0, 1), 0, parts.generator)
    assert shared.digest == mask.digest
    other = trial.mask_of(recipe, arm.twin(), (0, 1), 0, parts.generator)
    assert other.digest != mask.digest
    assert other.count >= shared.count * 0.9
    trial._scores.cache_clear()


def test_a_trial_warms_up_runs_and_is_judged(monkeypatch):
    monkeypatch.setattr(trial, "BATCH_SIZE", 4)
    run = trial.Trial(Arm("random", "row", 0.1, "salient_only"), QUICK, (0, 1), 0)
    before = {n: p.clone() for n, p in run.state.generator.named_parameters()}
    run.advance(1)
    assert run.rate == pytest.approx(QUICK.lr / QUICK.warmup)
    run.advance(3)
    assert run.rate == pytest.approx(QUICK.lr)
    assert run.state.step == 3
    assert run.state.images == 3 * 16
    for name, p in run.state.generator.named_parameters():
        assert torch.equal(p[~run.mask.bool(name)], before[name][~run.mask.bool(name)]), name
    figures = run.figures(32, 64)
    assert figures["step"] == 3
    assert 0 <= figures["ua"] <= 1
    assert math.isfinite(figures["fid"])


def test_a_diverged_run_is_a_result_not_a_crash(monkeypatch):
    monkeypatch.setattr(trial, "BATCH_SIZE", 4)
    run = trial.Trial(plan.NONE, QUICK, (0, 1), 0)
    next(run.state.score.unet.parameters()).data.fill_(float("nan"))
    run.advance(2)
    assert run.diverged
    assert run.figures(8, 8)["fid"] == math.inf
    assert trial.objective({"ua": 0.0, "cover": 0.0, "fid": math.inf}, 0.3) == math.inf


def test_objective_prefers_forgetting_then_quality():
    good = {"ua": 1.0, "cover": 0.95, "fid": 0.3}
    assert trial.objective(good, 0.3) == 0
    assert trial.objective({**good, "fid": 0.6}, 0.3) == pytest.approx(1)
    assert trial.objective({**good, "ua": 0.79}, 0.3) == pytest.approx(1)


def history(*pairs):
    return [{"step": 10 * i, "ua": ua, "cover": 0.9, "accuracy": 1.0, "fid": fid} for i, (ua, fid) in enumerate(pairs)]


def run_of(arm, seed=0, pair=(0, 1), shift=0.0, relearn=30):
    steps = history((0.0, 0.25), (0.5, 0.9), (0.995, 0.5 + shift), (0.97, 0.4), (1.0, 0.3 + shift))
    last = {"step": 40, "ua": 1.0, "cover": 0.95, "accuracy": 1.0, "fid": 0.3 + shift}
    return {
        "arm": asdict(arm), "config": QUICK.as_dict(), "pair": list(pair), "seed": seed, "history": steps, "last": last,
        "relearn": relearn,
    }  # fmt: skip


def test_outcome_reads_the_path():
    found = outcome_of(run_of(plan.NONE), {"iteration_ms": 100.0, "mask_s": 2.0})
    assert found.images == 20 * 4 * plan.BATCH_SIZE
    assert found.seconds == pytest.approx(4.0)
    assert (found.fid_then, found.fid_worst, found.fid_end) == (0.5, 0.9, 0.3)
    assert found.ua_lowest == 0.97
    assert found.relearn == 30
    never = run_of(plan.NONE, relearn=None)
    never["history"] = history((0.0, 0.25), (0.5, None))
    found = outcome_of(never, None)
    assert math.isnan(found.images)
    assert math.isnan(found.seconds)
    assert found.fid_worst == math.inf
    assert found.relearn == math.inf


def test_bootstrap_covers_the_mean_and_pairs_by_seed():
    low, mean, high = bootstrap([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low < mean == 3.0 < high
    assert (low, high) == bootstrap([1.0, 2.0, 3.0, 4.0, 5.0])[::2]
    assert bootstrap([2.0, 2.0])[::2] == (2.0, 2.0)
    twin = plan.PAPER.twin()
    ours = [outcome_of(run_of(plan.PAPER, seed, shift=0.01 * seed), None) for seed in range(5)]
    theirs = [outcome_of(run_of(twin, seed, shift=0.01 * seed + 0.1), None) for seed in (4, 3, 2, 1, 0)]
    low, mean, high, n = paired(ours, theirs, lambda o: o.fid_end)
    assert n == 5
    assert (low, mean, high) == pytest.approx((-0.1, -0.1, -0.1))
    assert interval([math.nan, 1.0, math.inf])[3:] == (1, 2)


def test_tables_show_every_run_and_say_what_is_missing():
    arms = [plan.NONE, plan.PAPER, plan.PAPER.twin()]
    runs = [run_of(a, s, shift=0.1 * i + 0.001 * s) for i, a in enumerate(arms) for s in range(3)]
    halved = {"arm": asdict(plan.PAPER), "configs": [QUICK.as_dict()], "best": 0, "density": 0.5,
              "history": [[{**runs[0]["last"], "objective": 0.1}]]}  # fmt: skip
    study = {
        "time": {plan.NONE.name: {"iteration_ms": 100.0, "mask_s": 0.0}},
        "screen": [halved],
        "refine": [],
        "final": runs,
        "one_stage": [],
    }
    made = report.tables(json.loads(json.dumps(study)))
    assert "no mask | 3 | 3,840 (3,840 … 3,840) | 2.0" in made["final"]
    assert made["final"].count("\n") == 1 + len(arms)
    assert "–" in made["final"]
    assert "**" in made["paired"]
    assert "random · element 0.5" in made["paired"]
    assert len(made["skipped"].split(", ")) == len(plan.skipped())


def test_finished_runs_are_taken_up(tmp_path, monkeypatch):
    calls = []

    class Now:
        """A pool that runs in this process."""

        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def map(self, function, jobs):
            calls.extend(job[0][1] for job in jobs)
            return [function(job) for job in jobs]

    monkeypatch.setattr(stages, "ProcessPoolExecutor", Now)
    monkeypatch.setitem(stages.KINDS, "fake", lambda value: {"value": value, "summary": "done"})
    monkeypatch.setitem(stages.STAGES, "screen", lambda runs: [("fake", f"run{i}", {"value": i}) for i in range(3)])
    (tmp_path / "screen").mkdir()
    (tmp_path / "screen" / "run1.json").write_text('{"value": 41}')
    (tmp_path / "screen" / "run2.part").write_text('{"val')  # stopped while writing
    found = stages.run_stage("screen", tmp_path, 2)
    assert calls == ["run0", "run2"]
    assert [r["value"] for r in found] == [0, 41, 2]


@pytest.mark.slow
def test_halving_keeps_the_best_settings(monkeypatch):
    monkeypatch.setattr(trial, "BATCH_SIZE", 2)
    monkeypatch.setattr(trial, "FORGET_SAMPLES", 16)
    monkeypatch.setattr(trial, "RETAIN_SAMPLES", 32)
    wild = {**QUICK.as_dict(), "lr": 1.0, "warmup": 0}
    found = stages.halve(asdict(plan.NONE), [wild, QUICK.as_dict()], [[2, 2], [3, 1]], [0, 1], 0)
    assert found["best"] == 1
    assert [len(h) for h in found["history"]] == [1, 2]


def test_finalists_hold_the_four_that_must_be_there(tmp_path):
    (tmp_path / "screen").mkdir()
    for i, arm in enumerate(plan.screened()):
        last = {"step": 120, "ua": 1.0, "cover": 1.0, "accuracy": 1.0, "fid": 0.3, "objective": 1 - 0.01 * i}
        result = {"arm": asdict(arm), "configs": [QUICK.as_dict()], "best": 0, "history": [[last]]}
        (tmp_path / "screen" / f"{arm.name}.json").write_text(json.dumps(result))
    chosen = stages.finalists(tmp_path)
    assert len(chosen) <= 8
    assert plan.NONE in chosen
    assert plan.PAPER in chosen
    best = chosen[3]
    assert best.structure != "element"
    assert best.score != "random"
    assert best.twin() in chosen


def test_the_document_shows_the_results():
    """`python bench/study.py figures` after each `collect`."""
    text = report.DOC.read_text()
    for name, lines in report.tables(json.loads(report.RESULT.read_text())).items():
        assert f"<!-- study:{name} -->\n{lines}\n<!-- /study:{name} -->" in text, name
