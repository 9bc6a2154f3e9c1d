"""A run folder stands alone: moved, used from elsewhere, its captions edited or gone, its model moved, replaced or gone."""

import json
import os
import shutil

import pytest
from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline

from pecker_fast import files
from pecker_fast.cli import main
from pecker_fast.errors import ModelError, OutputError
from pecker_fast.recipe import load_recipe
from pecker_fast.records import read_inputs, read_recipe
from pecker_fast.runs import evaluate_run, export_run, sample_run, train

RETAIN = ["a red square", "a blue triangle on the right", "green star", "a white dog", "see readme.txt"]
CAPTIONS = ["a red circle on the left", "a photo of the blue circle", "small circle"]


@pytest.fixture(autouse=True)
def no_forecast(monkeypatch, plain_plots):
    monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)


def dump(path, **keys):
    common = {"batch_size": 2, "steps": 1, "mask": {"samples": 4, "density": 0.1}, "engine": {"threads": 1}}
    files.write_json(path, {**common, **keys})


def forgetful(recipe, output, **keys):
    return train(load_recipe(recipe).model_copy(update={"output": output, **keys}), quiet=True).run_dir


@pytest.fixture(scope="module")
def text_project(tmp_path_factory):
    """A folder with a model, caption files, a recipe and a run, all named by relative paths."""
    home = tmp_path_factory.mktemp("text") / "proj"
    tiny_pipeline(home / "sd1", "sd1")
    files.write_text(home / "captions.txt", "# kept\n" + "\n".join(RETAIN) + "\n")
    files.write_text(home / "forget.txt", "\n".join(CAPTIONS) + "\n")
    dump(
        home / "r.yaml", model="sd1", output="runs/x", retain="captions.txt", cover="square", alpha=1.0,
        forget={"concept": "circle", "captions": "forget.txt"}, timesteps={"init": 625, "min": 20, "max": 980},
        evaluate={"every": 0, "final": 0, "teacher_steps": 2, "prompts": "captions_judged.txt"},
    )  # fmt: skip
    files.write_text(home / "captions_judged.txt", "\n".join((*CAPTIONS, *RETAIN)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)
        train(load_recipe("r.yaml"), quiet=True)
        sample_run("runs/x", count=1, output="drawn.png")
    return home


@pytest.fixture(scope="module")
def class_project(tmp_path_factory):
    home = tmp_path_factory.mktemp("class") / "proj"
    write_tiny_model(home / "model")
    dump(
        home / "r.yaml", model="model", output="runs/x", forget=0, cover=1,
        evaluate={"every": 0, "final": 12, "teacher_steps": 2},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(load_recipe("r.yaml"), quiet=True)
        sample_run("runs/x", count=1, output="drawn.png")
    return home


def elsewhere(project, tmp_path, monkeypatch, name="proj"):
    """A copy of a project, and another working folder."""
    shutil.copytree(project, tmp_path / name)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    shutil.rmtree(tmp_path / name / "runs" / "x" / "samples")
    return tmp_path / name


def gone(project, path):
    """The folder the run was made in has no such entry any more: nor is it found there, by its full path."""
    hidden = project / path
    hidden.rename(project / "hidden")
    return lambda: (project / "hidden").rename(hidden)


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_run_that_was_moved_alone_is_drawn_from_as_before(kind, request, tmp_path, monkeypatch):
    project = request.getfixturevalue(f"{kind}_project")
    back = gone(project, "model" if kind == "class" else "sd1")
    try:
        shutil.copytree(project / "runs" / "x", tmp_path / "moved")
        monkeypatch.chdir(tmp_path)
        drawn = sample_run("moved", count=1, output="drawn.png")
        assert drawn.read_bytes() == (project / "drawn.png").read_bytes()
        if kind == "text":
            sample_run("moved", count=1, prompts=["a dog"])
        before = files.read_tensors(tmp_path / "moved/pipeline/unet/diffusion_pytorch_model.safetensors")[0]
        for form in ("diffusers", "unet", *(["single"] if kind == "text" else [])):
            export_run("moved", form=form)
        for path in ("pipeline/unet/diffusion_pytorch_model.safetensors", "unet.safetensors"):
            after = files.read_tensors(tmp_path / "moved" / path)[0]
            assert files.hash_of(after) == files.hash_of(before)
        assert json.loads((tmp_path / "moved/pipeline/model.json").read_text()) == json.loads(
            (project / "runs/x/pipeline/model.json").read_text()
        )
        name = "model" if kind == "class" else "sd1"
        lost = rf"model: {name} of this run is gone \(looked for at {project / name}, .*{tmp_path / name}\)"
        for attempt in (
            lambda: export_run("moved", form="delta"),
            lambda: sample_run("moved", before=True),
            lambda: evaluate_run("moved"),
            lambda: train(read_recipe("moved/recipe.yaml"), quiet=True),
        ):
            with pytest.raises(ModelError, match=lost):
                attempt()
        assert main(["report", "moved"]) == main(["mask", "moved"]) == 0
    finally:
        back()


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "class"])
def test_a_project_that_was_moved_as_a_whole(kind, request, tmp_path, monkeypatch):
    """The model is found where it lies as seen from the run."""
    project = request.getfixturevalue(f"{kind}_project")
    home = elsewhere(project, tmp_path, monkeypatch)
    back = gone(project, "model" if kind == "class" else "sd1")
    try:
        for name in ("captions.txt", "forget.txt", "captions_judged.txt"):
            (home / name).unlink(missing_ok=True)
        run = home / "runs" / "x"
        sample_run(run, count=1, before=True)
        delta = export_run(run, tmp_path / "d.safetensors", form="delta")
        facts = json.loads((run / "pipeline/model.json").read_text())
        header = files.read_tensors(delta)[1]
        assert header["base_sha256"] == facts["base_sha256"]
        if kind == "class":
            assert evaluate_run(run, samples=12)["after"]["ua"] is not None
        # on from where it stopped, from another folder, to more steps
        longer = read_recipe(str(run / "recipe.yaml"), ["steps=2"])
        assert longer.output == str(run)
        train(longer, quiet=True)
        events = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
        assert [e["resumed_from"] for e in events if e["event"] == "start"] == [None, 1]
        assert {e["base_sha256"] for e in events if e["event"] == "start"} == {facts["base_sha256"]}
        assert not list((tmp_path / "else").iterdir())
        assert read_inputs(run).paths["model"] == str(home / ("model" if kind == "class" else "sd1"))
        assert load_recipe(run / "recipe.yaml").model == ("model" if kind == "class" else "sd1")
    finally:
        back()


@pytest.mark.slow
def test_captions_that_were_edited_are_told_and_not_taken(text_project, tmp_path, monkeypatch, capsys):
    home = elsewhere(text_project, tmp_path, monkeypatch)
    monkeypatch.chdir(home)
    drawn = sample_run("runs/x", count=1, output="again.png")
    (home / "captions.txt").write_text("a green dog\n")
    assert sample_run("runs/x", count=1, output="third.png").read_bytes() == drawn.read_bytes()
    capsys.readouterr()
    forgetful("r.yaml", "runs/x", steps=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "retain: its prompts have changed since the run in runs/x began" in err
    assert read_inputs(home / "runs/x").prompts["retain"][:2] == RETAIN[:2]
    assert read_inputs(home / "runs/x").prompts["retain"][-1] == "see readme.txt "  # a text, and no file's name
    started_over = forgetful("r.yaml", "runs/x", resume="never")
    assert read_inputs(started_over).prompts["retain"] == ["a green dog"]


def test_another_model_in_the_place_of_the_runs_own_is_refused(class_project, tmp_path, monkeypatch):
    home = elsewhere(class_project, tmp_path, monkeypatch)
    back = gone(class_project, "model")
    try:
        shutil.rmtree(home / "model")
        write_tiny_model(home / "model", seed=5)
        with pytest.raises(ModelError, match="not the model this run began with"):
            export_run(home / "runs/x", form="delta")
        with pytest.raises(ModelError, match="not the model this run began with"):
            sample_run(home / "runs/x", before=True)
    finally:
        back()


def test_a_run_of_an_earlier_version_is_used_by_the_names_in_its_recipe(class_project, tmp_path, monkeypatch):
    home = elsewhere(class_project, tmp_path, monkeypatch)
    (home / "runs/x/inputs.json").unlink()
    sample_run(home / "runs/x", count=1)
    monkeypatch.chdir(home)
    sample_run("runs/x", count=1, before=True)
    export_run("runs/x", tmp_path / "d.safetensors", form="delta")


def test_a_picture_goes_over_pictures_alone(class_project, tmp_path, monkeypatch):
    run = class_project / "runs" / "x"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "notes.png").write_text("mine")
    for name in ("notes.txt", "notes.png", "."):
        with pytest.raises(OutputError):
            sample_run(run, count=1, output=name)
        assert main(["mask", str(run), "--plot", name]) == 2
    assert sorted(os.listdir(tmp_path)) == ["notes.png", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "notes.png").read_text() == "mine"


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["text", "class"])
def test_base_and_delta_are_the_pipeline_of_the_run(kind, request, tmp_path, monkeypatch):
    """Card, model.json, schedule and index as the run's own export has them."""
    project = request.getfixturevalue(f"{kind}_project")
    monkeypatch.chdir(project)
    base = project / ("model" if kind == "class" else "sd1")
    files.write_text(base / "README.md", "the base knows circles")
    files.write_json(base / "model.json", {"null_class": 3, "made": "by hand"})
    delta = export_run("runs/x", tmp_path / "d.safetensors", form="delta")
    from pecker_fast.runs import apply_delta_file

    applied, pipeline = apply_delta_file(delta, str(base), tmp_path / "applied"), project / "runs/x/pipeline"
    for name in ("model.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (applied, pipeline))
        assert {**mine, "_name_or_path": 0} == {**theirs, "_name_or_path": 0}, name
    card = (applied / "README.md").read_text()
    assert "# One-step generator that" in card
    assert "the base knows" not in card
    held = files.read_tensors(applied / "unet/diffusion_pytorch_model.safetensors")[0]
    facts = json.loads((applied / "model.json").read_text())
    assert facts["weights_sha256"] == files.hash_of(held) == files.read_tensors(delta)[1]["result_sha256"]
    assert facts["base_sha256"] == files.hash_of(files.read_weights(base / "unet"))
    assert facts["base_sha256"] in (pipeline / "README.md").read_text()
    assert facts["base_sha256"] in card
    start = json.loads((project / "runs/x/run.jsonl").read_text().splitlines()[0])
    assert start["base_sha256"] == facts["base_sha256"]
