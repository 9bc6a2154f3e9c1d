"""`train` from recipe to run folder on a tiny model: what it leaves, what it never opens, how it resumes."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from pecker_fast import files
from pecker_fast.errors import CheckpointError, OutputError, PeckerError, RecipeError
from pecker_fast.records import checkpoint
from pecker_fast.runs.finished import evaluate_run, export_run, sample_run
from pecker_fast.runs.start import train, unlearn

METRICS = {"ua", "cover_rate", "retain_accuracy", "fid", "inception_score", "precision", "recall"}


def final_files(run_dir):
    """sha256 of everything that decides the outcome: last checkpoint's tensors, exported weights, mask."""
    last = checkpoint.list_checkpoints(run_dir)[-1]
    paths = [*sorted(last.glob("*.safetensors")), run_dir / "pipeline" / "unet" / files.WEIGHTS_NAME]
    return {p.name: files.sha256_file(p) for p in paths}


@pytest.mark.plots
@pytest.mark.books
def test_run_folder_is_complete(tiny_recipe):
    result = train(tiny_recipe(), quiet=True)
    run = result.run_dir
    for name in ("recipe.yaml", "run.jsonl", "mask.safetensors", "metrics.json", "report.html", "pipeline/README.md",
                 "samples/before.png", "samples/after.png", "samples/teacher.png"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert (run / "report.html").read_text().count("<path") > 10  # plots
    metrics = json.loads((run / "metrics.json").read_text())
    for row in ("before", "after", "teacher"):
        assert set(metrics[row]) >= METRICS
    assert {"training_s", "images", "flops", "peak_memory_bytes"} <= set(metrics["cost"])
    assert metrics["cost"]["images"] == 4 * 4 * 4  # iterations · (two branches in each of two steps) · batch
    assert metrics["cost"]["flops"] > 0
    assert {"held_out_accuracy", "teacher_accuracy", "fid_floor"} <= set(metrics["judge"])
    assert [p.name for p in checkpoint.list_checkpoints(run)] == ["step-000002", "step-000004"]
    events = [json.loads(line)["event"] for line in (run / "run.jsonl").read_text().splitlines()]
    assert events[0] == "start"
    assert events[-1] == "end"
    assert events.count("evaluate") == 2


@pytest.mark.slow
def test_a_run_in_bfloat16_with_warm_up_resumes_bit_identically(tiny_recipe, tmp_path):
    keys = {"precision": "bf16", "lr": {"generator": 1e-4, "score": 1e-4, "warmup": 3}, "steps": 4,
            "evaluate": {"final": 0, "every": 0}, "checkpoint": {"every": 1, "keep": 9}}  # fmt: skip
    whole = train(tiny_recipe(**keys, output=str(tmp_path / "whole")), quiet=True).run_dir
    point = checkpoint.list_checkpoints(whole)[1]
    resumed = train(tiny_recipe(**keys, output=str(tmp_path / "resumed"), resume=str(point)), quiet=True).run_dir
    assert final_files(resumed) == final_files(whole)
    keys["lr"] = {**keys["lr"], "warmup": 0}
    assert final_files(train(tiny_recipe(**keys), quiet=True).run_dir) != final_files(whole)


@pytest.mark.slow
def test_other_seed_gives_other_weights(tiny_recipe, tmp_path):
    a = train(tiny_recipe(output=str(tmp_path / "a"), evaluate={"final": 0}), quiet=True).run_dir
    b = train(tiny_recipe(output=str(tmp_path / "b"), evaluate={"final": 0}, seed=1), quiet=True).run_dir
    assert final_files(a) != final_files(b)


def test_train_opens_no_data_set(tiny_recipe, monkeypatch):
    """Data-free: with every loader made to raise, training, evaluation and report all run."""
    import pecker_fast.data.datasets as data

    def refuse(*args, **kwargs):
        raise AssertionError("a data set was opened")

    for name in ("open_data", "digits", "cifar10", "stl10", "image_folder", "forget_images"):
        monkeypatch.setattr(data, name, refuse)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert train(tiny_recipe(), quiet=True).metrics["after"] is not None
    with pytest.raises(AssertionError, match="a data set was opened"):  # the gate does close the door
        train(tiny_recipe(mask={"data": "some/folder"}, output="x"), quiet=True)


@pytest.mark.some(2)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_pipeline_draws_the_same_in_stock_diffusers(tiny_recipe, tmp_path, prediction_type):
    """The very lines of the model card, run as they stand, against our own sampler."""
    model = write_tiny_model(tmp_path / "model", prediction_type)
    run = train(tiny_recipe(model=str(model), evaluate={"every": 0, "final": 0}), quiet=True).run_dir
    card = (run / "pipeline" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("'pipeline'", repr(str(run / "pipeline")))
    names: dict = {}
    exec(code, names)
    from pecker_fast.forgetting.losses import generate
    from pecker_fast.loading.parts import load_parts
    from pecker_fast.runs.finished import load_run, trained_generator

    loaded = load_run(run)
    generator = trained_generator(loaded, load_parts(loaded.recipe))
    with torch.no_grad():
        ours = generate(generator, names["z"], names["labels"], 440).clamp(-1, 1)
    assert names["labels"].tolist() == [0, 1, 2]
    assert float((ours - names["images"]).abs().max()) <= 1e-3
    assert (
        float((ours - generate(generator, names["z"], names["labels"], 300).detach().clamp(-1, 1)).abs().max()) > 1e-3
    )


def test_zero_steps_leave_the_weights_bit_identical(tiny_recipe, tiny_model):
    run = train(tiny_recipe(steps=0, evaluate={"every": 0, "final": 0}), quiet=True).run_dir
    base = load_file(tiny_model / "unet" / files.WEIGHTS_NAME)
    out = load_file(run / "pipeline" / "unet" / files.WEIGHTS_NAME)
    assert base.keys() == out.keys()
    assert all(torch.equal(base[name], out[name]) for name in base)


def test_weights_outside_the_mask_are_proven_untouched(tiny_recipe):
    result = train(tiny_recipe(update_rule="salient_only", optimizer={"weight_decay": 0.1}), quiet=True)
    proof = result.metrics["outside_mask"]
    assert proof["weights"] > 0
    assert proof["before_sha256"] == proof["after_sha256"]


def test_finished_run_is_not_run_again(tiny_recipe):
    run = train(tiny_recipe(), quiet=True).run_dir
    before = final_files(run)
    stamp = (run / "metrics.json").stat().st_mtime_ns
    assert train(tiny_recipe(), quiet=True).metrics is not None
    assert (run / "metrics.json").stat().st_mtime_ns == stamp
    assert final_files(run) == before


def test_a_longer_run_goes_on_where_the_shorter_ended(tiny_recipe, tmp_path):
    long = train(tiny_recipe(steps=6, output=str(tmp_path / "long")), quiet=True).run_dir
    short = train(tiny_recipe(steps=4), quiet=True).run_dir
    train(tiny_recipe(steps=6), quiet=True)
    assert final_files(short) == final_files(long)


@pytest.mark.slow
def test_folder_of_another_run_is_left_alone(tiny_recipe, tmp_path):
    run = train(tiny_recipe(evaluate={"final": 0}), quiet=True).run_dir
    before = final_files(run)
    with pytest.raises(OutputError, match=r"another run \(forget is 0 there, 2 here\)"):
        train(tiny_recipe(forget=2), quiet=True)
    assert final_files(run) == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(OutputError, match="not a run folder"):
        train(tiny_recipe(output=str(tmp_path / "letters")), quiet=True)
    assert train(tiny_recipe(forget=2, resume="never", evaluate={"final": 0}), quiet=True).run_dir == run


def test_explicit_resume_needs_something_to_resume(tiny_recipe, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(tiny_recipe(resume=str(tmp_path)), quiet=True)


def test_checkpoint_of_another_model_is_refused(tiny_recipe, tmp_path):
    run = train(tiny_recipe(evaluate={"final": 0}), quiet=True).run_dir
    point = str(checkpoint.list_checkpoints(run)[-1])
    other = write_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(tiny_recipe(seed=4, output=str(tmp_path / "o1"), resume=point), quiet=True)
    with pytest.raises(PeckerError, match="another"):
        train(tiny_recipe(model=str(other), output=str(tmp_path / "o2"), resume=point), quiet=True)


def test_damaged_checkpoint_is_passed_over_for_the_one_before(tiny_recipe, capsys):
    run = train(tiny_recipe(evaluate={"final": 0}), quiet=True).run_dir
    want = final_files(run)
    newest = checkpoint.list_checkpoints(run)[-1]
    path = newest / "ema.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (run / "metrics.json").unlink()
    train(tiny_recipe(evaluate={"final": 0}), quiet=True)
    assert "step-000004/ema.safetensors: damaged" in capsys.readouterr().err
    assert final_files(run) == want


def test_dry_run_writes_nothing(tiny_recipe, tmp_path):
    train(tiny_recipe(), dry_run=True)
    assert not (tmp_path / "run").exists()


def test_sample_evaluate_export(tiny_recipe, tmp_path):
    run = train(tiny_recipe(), quiet=True).run_dir
    assert sample_run(run, classes=[1, 2], count=3, seed=5, output=tmp_path / "a.png").stat().st_size > 0
    assert sample_run(run, before=True).is_file()
    with pytest.raises(RecipeError, match="out of range"):
        sample_run(run, classes=[3])
    again = evaluate_run(run, samples=12)
    recorded = json.loads((run / "metrics.json").read_text())
    assert again["after"] == recorded["after"]
    exported = export_run(run, tmp_path / "copy")
    name = f"unet/{files.WEIGHTS_NAME}"
    assert files.sha256_file(exported / name) == files.sha256_file(run / "pipeline" / name)
    raw = export_run(run, tmp_path / "raw", weights="raw")
    assert files.sha256_file(raw / name) != files.sha256_file(exported / name)


def test_unlearn_takes_a_pipeline_object(tmp_path, tiny_model):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    pipeline = DDPMPipeline(
        UNet2DModel.from_pretrained(tiny_model, subfolder="unet"),
        DDPMScheduler.from_pretrained(tiny_model, subfolder="scheduler"),
    )
    keys = {"steps": 2, "batch_size": 4, "mask": {"samples": 4}, "retain": [2]}
    result = unlearn(pipeline, forget=0, cover=1, output=tmp_path / "run", **keys)
    assert (result.run_dir / "pipeline" / "unet").is_dir()
    assert result.metrics["after"] is None  # no judge came with the object


def test_a_generator_cannot_be_a_teacher(tiny_recipe, tmp_path):
    run = train(tiny_recipe(evaluate={"final": 0}), quiet=True).run_dir
    with pytest.raises(PeckerError, match="one-step generator cannot be the teacher"):
        train(tiny_recipe(model=str(run / "pipeline"), output=str(tmp_path / "again")), quiet=True)
    chained = tiny_recipe(
        generator=str(run / "pipeline"), forget=1, cover=2, output=str(tmp_path / "again"), evaluate={"final": 0}
    )
    assert train(chained, quiet=True).report is not None


def test_null_class_is_neither_forgettable_nor_retained(tiny_recipe):
    with pytest.raises(RecipeError, match="class 3 is out of range; the model's classes are 0 to 2"):
        train(tiny_recipe(forget=3), quiet=True)
    with pytest.raises(RecipeError, match="class 3 is out of range"):
        train(tiny_recipe(retain=[2, 3]), quiet=True)


def test_weights_kept_in_bfloat16_that_did_not_move_have_the_bases_bits(tiny_recipe, tiny_model):
    keys = {"steps": 0, "precision": "bf16", "engine": {"weights": "bf16"}, "evaluate": {"every": 0, "final": 0}}
    run = train(tiny_recipe(**keys), quiet=True).run_dir
    base, result = files.read_weights(tiny_model / "unet"), files.read_weights(run / "pipeline" / "unet")
    assert all(torch.equal(base[name], tensor) for name, tensor in result.items())
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in base.values())  # the control
