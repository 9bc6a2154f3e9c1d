"""A run that goes on in other circumstances, or was made by an earlier version: one line where bits will differ, else none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import copied, small_recipe, small_run
from tiny_models import write_tiny_model

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.machine import hardware
from pecker_fast.records import checkpoint
from pecker_fast.records.manifest import other_machine, read_manifest
from pecker_fast.runs import export_run, sample_run, train

STORED = Path(__file__).parents[1] / "records" / "stored"
QUICK = {"evaluate": {"every": 0, "final": 0, "teacher_steps": 2}}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    return small_run(tiny_model, tmp_path_factory.mktemp("circumstances") / "run", **QUICK)


def test_a_checkpoint_says_where_it_was_made(made):
    newest = checkpoint.list_checkpoints(made)[-1]
    machine = read_manifest(newest)["machine"]
    assert machine == hardware.numerics()
    assert machine["threads"] == torch.get_num_threads()
    assert other_machine(newest) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 63),
        ("instructions", "AVX512, kernels avx512f"),
        ("device", "another"),
        ("torch", "1.0"),
        ("ranks", 4),
    ],
)
def test_every_change_of_circumstances_is_one_line(made, monkeypatch, key, value):
    here = hardware.numerics()
    monkeypatch.setattr(hardware, "numerics", lambda: here | {key: value})
    (line,) = other_machine(checkpoint.list_checkpoints(made)[-1])
    assert f"{key} {here[key]} then, {value} now" in line
    assert "bits will differ" in line


@pytest.mark.slow
def test_a_resume_with_more_threads_says_so(made, tmp_path, tiny_model, capsys, plain_plots):
    run = copied(made, tmp_path)
    train(small_recipe(tiny_model, run, steps=5, **QUICK), quiet=True)
    assert "bits will differ" not in capsys.readouterr().err
    threads = torch.get_num_threads()
    try:
        train(small_recipe(tiny_model, run, steps=6, engine={"threads": threads + 1}, **QUICK), quiet=True)
    finally:
        torch.set_num_threads(threads)
    err = capsys.readouterr().err
    assert err.count("bits will differ") == 1
    assert f"threads {threads} then, {threads + 1} now" in err


def test_a_run_of_an_earlier_version_is_exported_from_its_own_base_alone(tmp_path, monkeypatch, capsys):
    """Its checkpoint has no checksum, no machine, and calls `base_sha256` what the run starts from."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert read_manifest(checkpoint.list_checkpoints(Path("run"))[-1])["version"] == 1
    card = (export_run("run", "out") / "README.md").read_text()
    assert files.hash_of(files.read_weights(Path("model/unet"))) in card
    sample_run("run", count=1, before=True, output="before.png")
    assert "bits will differ" not in capsys.readouterr().err
    text = Path("run/recipe.yaml").read_text()
    Path("run/recipe.yaml").write_text(text.replace("forget: 0", "forget: 2"))
    with pytest.raises(Exception, match=r"recipe\.yaml: not the recipe this run was trained with"):
        export_run("run", "out2")
    Path("run/recipe.yaml").write_text(text)
    shutil.rmtree("model")
    write_tiny_model(Path("model"), seed=5)
    with pytest.raises(ModelError, match="not the model this run began with"):
        export_run("run", "out2")
    assert not Path("out2").exists()


def test_inputs_and_figures_of_an_earlier_version_are_read(made, tmp_path):
    run = copied(made, tmp_path)
    for name in ("inputs.json", "metrics.json"):
        content = json.loads((run / name).read_text())
        del content[files.SEAL]
        files.write_json(run / name, {**content, "version": 1} if name == "inputs.json" else content)
    sample_run(run, count=1, before=True, output=tmp_path / "a.png")
    export_run(run, tmp_path / "out")
