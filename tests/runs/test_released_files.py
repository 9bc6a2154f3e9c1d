"""Whole runs from model folders as they were released: what comes out loads in stock diffusers and is all of one model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import tiny_pipeline

from pecker_fast import files
from pecker_fast.cli import main
from pecker_fast.recipe import recipe_from
from pecker_fast.runs import finished as tools
from pecker_fast.runs.start import train

CAPTIONS = ["a red circle on the left", "small circle", "a red square", "a white dog"]
BESIDE = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "requires_safety_checker": True,
}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(autouse=True)
def no_forecast(monkeypatch, plain_plots):
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)
    monkeypatch.setattr("pecker_fast.runs.start.planned", lambda recipe, device: [])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")


def keys(model, output, **more):
    given = {
        "model": str(model), "forget": {"concept": "circle", "captions": CAPTIONS}, "cover": "square",
        "retain": CAPTIONS[2:], "batch_size": 2, "steps": 0, "alpha": 1.0, "ema": 0.0,
        "timesteps": {"init": 625, "min": 20, "max": 980}, "mask": {"samples": 4, "density": 0.1},
        "evaluate": {"every": 0, "final": 0, "teacher_steps": 2}, "output": str(output),
    }  # fmt: skip
    return given | more


def restored(folder: Path, part: str, change, name: str | None = None) -> None:
    """Write a part's weights again, each tensor changed, under another file name if `name`."""
    old = folder / part / files.weights_name(part)
    tensors = dict(change(key, tensor) for key, tensor in files.read_tensors(old)[0].items())
    old.unlink()
    files.write_tensors(folder / part / (name or old.name), tensors, {"format": "pt"})


def released(plain: Path, folder: Path) -> Path:
    """Stable Diffusion 1.5 as it was released, with half-precision variants alone."""
    shutil.copytree(plain, folder)
    index = files.read_index(folder) | BESIDE
    files.write_json(folder / "model_index.json", index)
    files.write_text(folder / "safety_checker" / "config.json", "never read")

    def vae(name, tensor):
        for new, was in OLD.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        return name, tensor.half()[:, :, None, None] if name.endswith("proj_attn.weight") else tensor.half()

    restored(folder, "vae", vae, "diffusion_pytorch_model.fp16.safetensors")
    restored(folder, "unet", lambda k, t: (k, t.half()), "diffusion_pytorch_model.fp16.safetensors")
    restored(folder, "text_encoder", lambda k, t: (f"text_model.{k}", t.half()), "model.fp16.safetensors")
    return folder


def test_stable_diffusion_as_it_was_released(plain, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    folder, run = released(plain, tmp_path / "model"), tmp_path / "run"
    train(recipe_from(keys(folder, run)))
    told = capsys.readouterr().err
    assert "left out, never loaded: " in told
    assert "safety_checker" in told
    assert "fp16 variant is taken for unet, vae, text_encoder" in told
    for form in ("unet", "single", "delta"):
        tools.export_run(run, form=form)
    applied = tools.apply_delta_file(run / "delta.safetensors", str(folder), tmp_path / "applied")
    base = files.read_weights(folder / "unet")
    for result in (run / "pipeline", applied):
        index = json.loads((result / "model_index.json").read_text())
        assert all(index[part] == [None, None] for part in BESIDE if part != "requires_safety_checker")
        assert index["requires_safety_checker"] is False
        assert not (result / "safety_checker").exists()
        assert all("fp16" not in file.name for file in result.rglob("*"))
        assert all(torch.equal(tensor, base[name]) for name, tensor in files.read_weights(result / "unet").items())
        pipe = DiffusionPipeline.from_pretrained(result)
        for part in ("vae", "text_encoder"):
            mine, wanted = getattr(pipe, part).state_dict(), files.read_weights(folder / part, files.weights_name(part))
            wanted = {name.removeprefix("text_model."): tensor for name, tensor in wanted.items()}
            assert all(torch.equal(mine[name], tensor.float()) for name, tensor in wanted.items()), part
            assert mine.keys() == wanted.keys()


@pytest.mark.slow
def test_a_float8_model_trains_and_what_has_changed_is_kept_in_float16(plain, tmp_path):
    folder, run = shutil.copytree(plain, tmp_path / "model"), tmp_path / "run"
    restored(folder, "unet", lambda k, t: (k, t.to(torch.float8_e4m3fn)))
    train(recipe_from(keys(folder, run, steps=1, lr=1e-3)), quiet=True)
    base, after = files.read_weights(folder / "unet"), files.read_weights(run / "pipeline" / "unet")
    assert base.keys() == after.keys()
    assert {t.dtype for t in base.values()} == {torch.float8_e4m3fn}
    kept = [name for name in base if after[name].dtype == torch.float8_e4m3fn]
    assert all(torch.equal(after[name].float(), base[name].float()) for name in kept)
    moved = [name for name in base if after[name].dtype == torch.float16]
    assert len(kept) + len(moved) == len(base)
    assert all(not torch.equal(after[name].float(), base[name].float()) for name in moved)
    assert moved
    tools.export_run(run, form="delta")
    applied = tools.apply_delta_file(run / "delta.safetensors", str(folder), tmp_path / "applied")
    result = files.read_weights(applied / "unet")
    assert all(torch.equal(result[name].float(), after[name].float()) for name in after)


def test_a_dry_run_looks_at_a_hub_model_and_refuses_what_training_would(plain, tmp_path, monkeypatch, capsys):
    folder = released(plain, tmp_path / "model")
    monkeypatch.setattr("pecker_fast.files.hub._download", lambda name, revision, **patterns: folder)
    monkeypatch.chdir(tmp_path)
    files.write_json(tmp_path / "mine.yaml", keys("me/model", tmp_path / "run"))
    assert main(["train", "mine.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "left out, never loaded: " in printed.err
    assert "safety_checker" in printed.err
    assert "only its configs were fetched" in printed.out
    index = files.read_index(folder)
    for change, message in (
        ({"safety_checker": ["my_checker", "Checker"]}, "safety_checker names custom code"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline is not supported yet"),
    ):
        files.write_json(folder / "model_index.json", index | change)
        assert main(["train", "mine.yaml", "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
