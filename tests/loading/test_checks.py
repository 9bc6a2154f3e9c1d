"""A recipe against the model it names: timesteps on schedules of any length, the null class, one-step generators as teachers."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from pecker_fast import files
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.loading import load_model, load_parts
from pecker_fast.loading.checks import fit_timesteps, timesteps_note
from pecker_fast.loading.parts import null_class_note
from pecker_fast.networks import load_denoiser
from pecker_fast.recipe import load_recipe, recipe_from
from pecker_fast.records.run_folder import trajectory, trajectory_sha256
from pecker_fast.runs.finished import export_run, load_run, sample_run
from pecker_fast.runs.start import train, unlearn


def positions(recipe):
    return tuple(recipe.timesteps.model_dump().values())


@pytest.mark.parametrize(
    ("given", "length", "want"),
    [
        ({}, 1000, (440, 38, 712)),
        ({}, 4000, (1760, 152, 2848)),
        ({}, 250, (110, 10, 178)),
        ({"init": 1760, "min": 152, "max": 2848}, 4000, (1760, 152, 2848)),
        ({"init": 440, "min": 38, "max": 712}, 4000, (440, 38, 712)),
        ({"init": 3000}, 4000, (3000, 152, 2848)),
    ],
)
def test_given_timesteps_stay_and_defaults_keep_their_share(given, length, want):
    recipe = recipe_from({"timesteps": given})
    assert positions(fit_timesteps(recipe, length)) == want
    assert positions(fit_timesteps(fit_timesteps(recipe, length), length)) == want
    assert (timesteps_note(recipe, length) is None) == (length == 1000)


def test_a_recipe_for_1000_steps_is_the_same_object():
    recipe = load_recipe("digits")
    assert fit_timesteps(recipe, 1000) is recipe


def test_defaults_that_no_longer_fit_beside_what_is_given_are_refused():
    with pytest.raises(RecipeError, match=r"timesteps.min: 152 must be below timesteps.max, 100"):
        fit_timesteps(recipe_from({"timesteps": {"max": 100}}), 4000)


def test_a_key_that_is_not_set_leaves_the_trajectory_of_earlier_runs():
    assert "null_class" not in trajectory(recipe_from({}))
    assert trajectory_sha256(recipe_from({"null_class": 10})) != trajectory_sha256(recipe_from({}))


@pytest.fixture
def long_model(tmp_path):
    model = write_tiny_model(tmp_path / "long", judge=False)
    DDPMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2").save_pretrained(model / "scheduler")
    return model


@pytest.mark.slow
def test_a_schedule_of_4000_steps_is_trained_on_and_told(tiny_recipe, long_model, capsys):
    keys = {"model": str(long_model), "evaluate": {"every": 0, "final": 0}}
    train(tiny_recipe(**keys), quiet=True, dry_run=True)
    told = capsys.readouterr().err
    assert "4000 timesteps, not 1000: timesteps init 1760, min 152, max 2848" in told
    run = train(tiny_recipe(**keys), quiet=True).run_dir
    assert positions(load_run(run).recipe) == (1760, 152, 2848)
    assert json.loads((run / "pipeline/model.json").read_text())["t_init"] == 1760
    assert train(tiny_recipe(**keys), quiet=True).metrics is not None  # the same command finds its own run
    assert sample_run(run).is_file()
    with pytest.raises(RecipeError, match=r"timesteps.max: 4001 is beyond the model's schedule of 4000"):
        load_model(tiny_recipe(**keys, timesteps={"max": 4001}))


def test_unlearn_leaves_defaults_to_the_model(long_model, tmp_path):
    result = unlearn(long_model, 0, 1, output=tmp_path / "run", steps=0, batch_size=4, null_class=2,
                     mask={"samples": 8}, evaluate={"every": 0, "final": 0, "teacher_steps": 2})  # fmt: skip
    recipe = load_run(result.run_dir).recipe
    assert positions(recipe) == (1760, 152, 2848)
    assert recipe.null_class == 2


def test_timesteps_beyond_1000_are_refused_by_a_model_of_1000(tiny_recipe):
    with pytest.raises(RecipeError, match=r"timesteps.init: 1760 is beyond the model's schedule of 1000 timesteps"):
        load_model(tiny_recipe(timesteps={"init": 1760}))


def test_the_recipes_null_class_is_no_class(tiny_recipe, tmp_path):
    model = write_tiny_model(tmp_path / "model", judge=False)
    (model / "model.json").unlink()
    keys = {"model": str(model), "evaluate": {"final": 0}}
    assert load_model(tiny_recipe(**keys)).conditions.retain == (1, 2, 3)
    with pytest.raises(
        RecipeError, match=r"guidance.teacher: 2 needs a model with a null class; use 1, or give null_class"
    ):
        load_model(tiny_recipe(**keys, guidance={"teacher": 2.0}))
    loaded = load_model(tiny_recipe(**keys, null_class=3, guidance={"teacher": 2.0}))
    assert loaded.conditions.retain == (1, 2)
    with pytest.raises(RecipeError, match="null_class: 7 is out of range"):
        load_model(tiny_recipe(**keys, null_class=7))


def test_a_null_class_among_the_judges_classes_is_refused(tiny_recipe):
    """The judge numbers its classes from 0 on: with a null class between them it would judge the wrong ones."""
    with pytest.raises(
        ModelError, match="the judge numbers its classes 0 to 2, the model's null class is 2 among them"
    ):
        load_model(tiny_recipe(null_class=2))


def test_an_undeclared_null_class_is_asked_for(tiny_model):
    teacher = load_denoiser(tiny_model)
    assert null_class_note(teacher) is None
    teacher.null_class = None
    assert null_class_note(teacher) is None
    teacher.unet.register_to_config(num_class_embeds=1001)
    assert null_class_note(teacher).endswith("give null_class=1000")


def test_a_one_step_generator_is_no_teacher_in_any_form(tiny_recipe, tmp_path):
    run = train(tiny_recipe(steps=0, evaluate={"every": 0, "final": 0}), quiet=True).run_dir
    copied = shutil.copytree(run / "pipeline", tmp_path / "copied")
    (copied / "model.json").unlink()  # its weights know it still
    flat = shutil.copytree(copied / "unet", tmp_path / "flat")
    shutil.copy(copied / "scheduler/scheduler_config.json", flat)
    for folder in (run / "pipeline", copied, flat):
        with pytest.raises(ModelError, match="a one-step generator cannot be the teacher"):
            load_parts(tiny_recipe(model=str(folder), evaluate={"final": 0}, output=str(tmp_path / "again")))
    start = tiny_recipe(generator=str(run / "pipeline"), evaluate={"final": 0}, output=str(tmp_path / "again"))
    assert load_parts(start).generator is not None  # what it is for
    weights = export_run(run, form="unet")
    metadata = files.read_head(weights)[1]
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["pecker_fast.t_init"] == "440"


def test_weights_that_say_another_prediction_than_their_scheduler_are_refused(tiny_recipe, tmp_path):
    model = write_tiny_model(tmp_path / "model", judge=False)
    path = model / "unet" / files.WEIGHTS_NAME
    for key, value, fits in (
        ("modelspec.prediction_type", "v", False), ("modelspec.predict_key", "epsilon", True),
        ("ss_v_parameterization", "True", False), ("ss_v_parameterization", "False", True),
        ("ss_zero_terminal_snr", "True", False),
    ):  # fmt: skip
        save_file(load_file(path), path, metadata={"format": "pt", key: value})
        recipe = tiny_recipe(model=str(model), evaluate={"final": 0})
        if fits:
            load_model(recipe)
        else:
            with pytest.raises(ModelError, match=f"{key} says .*, but .*scheduler has"):
                load_model(recipe)
            with pytest.raises(ModelError, match=f"{key} says .*, but the teacher's scheduler has"):
                load_parts(tiny_recipe(generator=str(model)))


@pytest.mark.parametrize("how", ["not finite", "raises"])
def test_a_teachers_row_that_fails_does_not_keep_a_run_from_its_export(tiny_recipe, monkeypatch, capsys, how):
    def fail(denoiser, labels, *args, **kwargs):
        if how == "raises":
            raise RuntimeError("out of luck")
        return torch.full((len(labels), *denoiser.sample_shape), float("nan"))

    monkeypatch.setattr("pecker_fast.runs.judging.ddim_sample", fail)
    result = train(tiny_recipe(steps=0, evaluate={"every": 0}), quiet=True)
    assert (result.run_dir / "pipeline/unet" / files.WEIGHTS_NAME).is_file()
    assert result.metrics["teacher"] is None
    assert result.metrics["after"] is not None
    assert "warning: the teacher's reference row is left empty" in capsys.readouterr().err
    assert not (result.run_dir / "samples/teacher.png").exists()
    card = (result.run_dir / "pipeline/README.md").read_text()
    assert "| ua | " in card
    assert "| – |" in card
