"""Text-to-image models that mean something else: what a single file says of itself, statistics of latents, one-step results."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import tiny_pipeline

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.forgetting import one_step_sample
from pecker_fast.forgetting.samplers import sample_noise
from pecker_fast.loading import load_model
from pecker_fast.networks.single_file import to_single_file
from pecker_fast.recipe import recipe_from
from pecker_fast.runs import finished as tools
from pecker_fast.runs import forecast
from pecker_fast.runs.start import train


@pytest.fixture(autouse=True)
def no_forecast(monkeypatch, plain_plots):
    """The memory forecast is most of the time of a run this small, and not what these tests are about."""
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "sdxl", "sdxl")


def recipe(model, output, **keys):
    given = {
        "model": str(model), "forget": {"concept": "circle", "prompts": ["a red {}"]}, "cover": "square",
        "retain": ["green star"], "batch_size": 2, "steps": 0, "ema": 0.0, "timesteps": {"init": 625, "min": 20, "max": 980},
        "mask": {"source": "none"}, "evaluate": {"every": 0, "final": 0, "teacher_steps": 2}, "output": str(output),
    }  # fmt: skip
    return recipe_from({**given, **keys})


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_statistics_of_latents_draw_what_stock_diffusers_draws(sdxl, tmp_path):
    from diffusers import DiffusionPipeline

    folder = shutil.copytree(sdxl, tmp_path / "model")
    vae = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
    edit(folder / "vae/config.json", **vae, scaling_factor=0.5)
    run = tmp_path / "run"
    train(recipe(folder, run), quiet=True)
    model = load_model(tools.load_run(run).recipe)
    generator = tools.trained_generator(tools.load_run(run), model)
    ours = one_step_sample(generator, torch.tensor(model.teacher.table.index(["green star"])), 5, 625)
    pipe = DiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "green star", num_inference_steps=1, timesteps=[625], guidance_scale=1.0, latents=sample_noise(generator, 1, 5),
        height=32, width=32, output_type="pt",
    ).images  # fmt: skip
    assert float((ours - (theirs * 2 - 1)).abs().max()) < 1e-3


SAID = [
    ({"v_pred": torch.zeros(0)}, {}, r"v_pred says v_prediction, but .*scheduler has prediction_type epsilon"),
    ({"ztsnr": torch.zeros(0)}, {}, r"ztsnr says zero terminal SNR, but .*rescale_betas_zero_snr false"),
    ({"edm_mean": torch.zeros(4)}, {}, r"edm_mean says the noise levels of EDM"),
    ({}, {"modelspec.prediction_type": "v"}, r"modelspec.prediction_type says v_prediction"),
    ({}, {"modelspec.predict_key": "rectified flow"}, r"modelspec.predict_key says rectified flow"),
    ({}, {"ss_v_parameterization": "True"}, r"ss_v_parameterization says v_prediction"),
]


@pytest.fixture(scope="module")
def single(sdxl):
    return to_single_file(sdxl, sdxl.parent / "single.safetensors")


@pytest.mark.parametrize(("tensors", "metadata", "match"), SAID)
def test_a_single_file_is_believed_about_its_prediction(sdxl, single, tmp_path, tensors, metadata, match):
    path = tmp_path / "model.safetensors"
    save_file({**load_file(single), **tensors}, path, metadata={"format": "pt", **metadata})
    with pytest.raises(ModelError, match=match):
        forecast.check_source(recipe(path, tmp_path / "run", model_config=str(sdxl)), path)


@pytest.mark.slow
def test_a_velocity_file_keeps_its_marks_and_a_folders_gets_them(sdxl, tmp_path):
    folder = shutil.copytree(sdxl, tmp_path / "model")
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    single = to_single_file(folder, tmp_path / "single.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(single).keys()
    run = tmp_path / "run"
    train(recipe(single, run, model_config=str(folder)), quiet=True)
    config = json.loads((run / "pipeline/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    out = tools.export_run(run, form="single")
    names, metadata = files.read_head(out)
    assert {"v_pred", "ztsnr"} <= names
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["pecker_fast.kind"] == "one-step generator"
    assert tools.export_run(run, form="unet").is_file()
    assert files.read_head(run / "unet.safetensors")[1]["modelspec.prediction_type"] == "v"


def test_a_one_step_result_is_no_teacher(sdxl, single, tmp_path):
    run = tmp_path / "run"
    train(recipe(sdxl, run), quiet=True)
    copied = shutil.copytree(run / "pipeline", tmp_path / "copied")
    (copied / "model.json").unlink()
    exported = tools.export_run(run, form="single")
    tools.export_run(run, form="delta")
    applied = tools.apply_delta_file(run / "delta.safetensors", str(single), tmp_path / "applied.safetensors")
    for source in (run / "pipeline", copied, exported, applied, tools.export_run(run, form="unet")):
        config = {"model_config": str(sdxl)} if source.is_file() else {}
        with pytest.raises(ModelError, match="a one-step generator cannot be the teacher"):
            load_model(recipe(source, tmp_path / "again", **config))


def test_configs_of_a_result_may_serve_another_file(sdxl, single, tmp_path):
    """Its weights are not what is loaded."""
    run = tmp_path / "run"
    train(recipe(sdxl, run), quiet=True)
    forecast.check_source(recipe(single, tmp_path / "again", model_config=str(run / "pipeline")), single)
