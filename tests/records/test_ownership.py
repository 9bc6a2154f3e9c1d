"""Whose folder is it: nothing of a user's, and nothing of another run, is ever removed or claimed."""

import json
import shutil

import pytest
from diffusers import DDPMScheduler
from tiny_models import write_tiny_model

from pecker_fast.errors import CheckpointError, ModelError, OutputError, RecipeError
from pecker_fast.recipe import idle_keys, load_recipe, recipe_from, recipe_to_yaml
from pecker_fast.records import checkpoint
from pecker_fast.records.run_folder import locked
from pecker_fast.runs.finished import export_run
from pecker_fast.runs.start import train, unlearn

QUICK = {"evaluate": {"every": 0, "final": 0}}


def test_a_folder_with_a_users_own_recipe_is_not_a_run_folder(tiny_recipe, tmp_path):
    home = tmp_path / "home"
    (home / "samples").mkdir(parents=True)
    (home / "samples" / "mine.png").write_text("x")
    recipe = tiny_recipe(output=str(home), **QUICK)
    (home / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    for resume in ("auto", "never"):
        with pytest.raises(OutputError, match="not a run folder"):
            train(recipe.model_copy(update={"resume": resume}), quiet=True)
    assert (home / "samples" / "mine.png").read_text() == "x"


def test_export_replaces_exports_only(tiny_recipe, tmp_path):
    run = train(tiny_recipe(**QUICK), quiet=True).run_dir
    teacher = write_tiny_model(tmp_path / "teacher")
    (teacher / "model_index.json").write_text("{}")
    with pytest.raises(OutputError, match="no exported generator"):
        export_run(run, teacher)
    assert (teacher / "judge").is_dir()
    out = export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out") == out
    with pytest.raises(RecipeError, match="give --output"):
        export_run(run, weights="raw")
    assert not list(tmp_path.glob(".out*"))


def test_an_export_before_anything_is_forgotten_is_refused(tiny_recipe, tmp_path):
    run = train(tiny_recipe(distill_steps=2, steps=2, checkpoint={"every": 1, "keep": 9}, **QUICK), quiet=True).run_dir
    for later in checkpoint.list_checkpoints(run)[2:]:
        shutil.rmtree(later)
    with pytest.raises(CheckpointError, match="nothing is forgotten yet"):
        export_run(run, tmp_path / "out")


@pytest.mark.slow
def test_resuming_elsewhere_brings_figures_grid_and_mask_along(tiny_recipe, tmp_path):
    run = train(tiny_recipe(), quiet=True).run_dir
    for point in checkpoint.list_checkpoints(run):
        other = tmp_path / point.name
        train(tiny_recipe(output=str(other), resume=str(point)), quiet=True)
        mine, theirs = (json.loads((r / "metrics.json").read_text()) for r in (run, other))
        assert theirs["before"] == mine["before"]
        assert theirs["after"] == mine["after"]
        for name in ("mask.safetensors", "samples/before.png"):
            assert (other / name).read_bytes() == (run / name).read_bytes()
        assert checkpoint.list_checkpoints(other)


def test_explicit_resume_refuses_before_anything_is_touched(tiny_recipe, tmp_path):
    run = train(tiny_recipe(**QUICK), quiet=True).run_dir
    other = train(tiny_recipe(seed=5, output=str(tmp_path / "other"), **QUICK), quiet=True).run_dir
    point = str(checkpoint.list_checkpoints(other)[-1])
    before = sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file())
    with pytest.raises(CheckpointError, match="another recipe"):
        train(tiny_recipe(resume=point, **QUICK), quiet=True)
    with pytest.raises(OutputError, match="another run"):
        train(tiny_recipe(seed=5, resume=point, **QUICK), quiet=True)
    assert sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file()) == before


@pytest.mark.slow
def test_figures_are_those_of_the_recipe_asked_for(tiny_recipe):
    train(tiny_recipe(), quiet=True)
    with pytest.raises(CheckpointError, match="has done 4 steps, the recipe wants 2"):
        train(tiny_recipe(steps=2), quiet=True)
    again = train(tiny_recipe(evaluate={"final": 15}), quiet=True)
    assert again.metrics["after"]["samples"] == 15
    longer = train(tiny_recipe(steps=6), quiet=True)
    assert longer.metrics["step"] == 6


def test_a_finished_run_without_checkpoints_is_not_wiped(tiny_recipe):
    run = train(tiny_recipe(**QUICK), quiet=True).run_dir
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(OutputError, match="finished run without checkpoints"):
        train(tiny_recipe(**QUICK), quiet=True)
    assert (run / "pipeline").is_dir()


def test_two_processes_do_not_share_a_folder(tiny_recipe, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(OutputError, match="another process"):
        train(tiny_recipe(**QUICK), quiet=True)


@pytest.mark.slow
def test_dry_run_checks_the_output_folder_too(tiny_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("x")
    with pytest.raises(OutputError, match="not a run folder"):
        train(tiny_recipe(), dry_run=True)


def test_unlearn_checks_the_object_and_the_folder(tmp_path):
    with pytest.raises(ModelError, match=r"has no \.unet and \.scheduler"):
        unlearn(object(), forget=0, cover=1, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pipeline_of_a_zero_snr_schedule_draws_the_same(tiny_recipe, tmp_path):
    model = write_tiny_model(tmp_path / "model", "v_prediction")
    DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(model / "scheduler")
    run = train(tiny_recipe(model=str(model), **QUICK), quiet=True).run_dir
    from diffusers import EulerDiscreteScheduler

    from pecker_fast.networks.schedule import load_schedule

    euler = EulerDiscreteScheduler.from_pretrained(run / "pipeline", subfolder="scheduler")
    euler.set_timesteps(timesteps=[440])
    schedule = load_schedule(model / "scheduler")
    assert float(euler.sigmas[0]) == pytest.approx(float(schedule.b[440] / schedule.a[440]), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"weights": {"score_retain": 0, "score_forget": 0}}, "ψ would learn nothing"),
        ({"weights": {"retain": 0, "forget": 0}}, "θ would learn nothing"),
        ({"weights": {"score_retain": 0}, "distill_steps": 5}, "distillation needs"),
    ],
)
def test_weights_that_leave_nothing_to_learn_are_refused(keys, match):
    with pytest.raises(RecipeError, match=match):
        recipe_from(keys)


def test_idle_keys_are_said():
    assert idle_keys(load_recipe("digits")) == []
    assert idle_keys(load_recipe("digits_sfd")) == []
    found = idle_keys(load_recipe("digits", ["mask.source=random", "mask.contrast=true", "mask.tile=[8,8]"]))
    assert found == [
        "mask.score has no effect with mask.source=random",
        "mask.contrast has no effect with mask.source=random",
        "mask.samples has no effect with mask.source=random",
        "mask.tile has no effect with mask.structure=element",
    ]


def test_teacher_steps_beyond_the_schedule_are_refused_before_training(tiny_recipe, tmp_path):
    model = write_tiny_model(tmp_path / "model")
    DDPMScheduler(num_train_timesteps=800).save_pretrained(model / "scheduler")
    with pytest.raises(RecipeError, match=r"evaluate.teacher_steps: 900 is beyond"):
        train(tiny_recipe(model=str(model), evaluate={"teacher_steps": 900}), quiet=True)
