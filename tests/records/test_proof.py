"""What a run folder says of itself is checked by every verb: recipe, inputs, figures and pipeline belong to its checkpoints."""

import json
import random
import re
import shutil

import pytest
from small_runs import copied, flipped, small_recipe, small_run
from tiny_models import write_tiny_model

from pecker_fast import files
from pecker_fast.errors import CheckpointError, DataError, ModelError, OutputError, PeckerError
from pecker_fast.loading.exported import check_exported
from pecker_fast.recipe import load_recipe
from pecker_fast.records import read_inputs, read_metrics, read_recipe
from pecker_fast.records.run_folder import marked
from pecker_fast.report import write_report
from pecker_fast.runs import evaluate_run, export_run, sample_run, train

UNET = f"pipeline/unet/{files.WEIGHTS_NAME}"


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    return small_run(tiny_model, tmp_path_factory.mktemp("proof") / "run")


@pytest.fixture
def run(made, tmp_path, plain_plots):
    return copied(made, tmp_path)


def reworded(run, old, new, resealed=False):
    """recipe.yaml with other words; resealed: under a checksum of its own."""
    path = run / "recipe.yaml"
    text = path.read_text()
    assert text.count(f"\n{old}\n") == 1
    text = text.replace(f"\n{old}\n", f"\n{new}\n")
    path.write_text(marked(text.split("\n", 2)[2]) if resealed else text)


def verbs(run, tmp_path):
    """Everything that draws from, judges or tells of a run."""
    yield lambda: sample_run(run, count=1, output=tmp_path / "a.png")
    yield lambda: sample_run(run, count=1, output=tmp_path / "b.png", before=True)
    yield lambda: evaluate_run(run, samples=12)
    for form in ("diffusers", "unet", "delta"):
        yield lambda form=form: export_run(run, tmp_path / f"out-{form}.safetensors", form=form)


@pytest.mark.parametrize("resealed", [False, True], ids=["edited", "resealed"])
@pytest.mark.parametrize(
    ("old", "new"), [("forget: 0", "forget: 2"), ("seed: 0", "seed: 1"), ("ema: 0.98", "ema: 0.9")]
)
def test_a_recipe_that_was_changed_states_nothing(run, tmp_path, old, new, resealed):
    reworded(run, old, new, resealed)
    for verb in verbs(run, tmp_path):
        with pytest.raises(CheckpointError, match=r"recipe\.yaml: (damaged or edited|not the recipe this run)"):
            verb()
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        train(read_recipe(str(run / "recipe.yaml")), quiet=True)
    assert not list(tmp_path.glob("out-*"))
    page = write_report(run).read_text()
    assert "Could not be read" in page
    assert new not in page


def test_a_changed_length_is_an_edit_too(run, tmp_path):
    """Keys that a run may be resumed with another value of are under the checksum alone."""
    reworded(run, "steps: 4", "steps: 9")
    with pytest.raises(CheckpointError, match="damaged or edited"):
        export_run(run, tmp_path / "out")
    longer = train(read_recipe(str(run / "recipe.yaml"), ["steps=5", "evaluate.final=0"]), quiet=True).run_dir
    export_run(longer, tmp_path / "out")  # training has written it anew
    assert load_recipe(longer / "recipe.yaml").steps == 5


def test_a_recipe_for_another_model_exports_nothing(run, tiny_model, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=5)
    reworded(run, f"model: {tiny_model}", f"model: {other}", resealed=True)
    for keep in (True, False):
        if not keep:
            (run / "inputs.json").unlink()
        for verb in verbs(run, tmp_path):
            with pytest.raises(CheckpointError, match="not the recipe this run"):
                verb()


def test_another_base_is_found_without_inputs_too(made, tmp_path, tiny_model, plain_plots):
    """The checkpoints know the base they belong to, also where inputs.json is gone."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    run = small_run(model, tmp_path / "run", evaluate={"every": 0, "final": 0})
    (run / "inputs.json").unlink()
    export_run(run, tmp_path / "a.safetensors", form="delta")
    shutil.rmtree(model)
    write_tiny_model(model, seed=5)
    for gone in ((), ("pipeline",)):
        for name in gone:
            shutil.rmtree(run / name)
        for attempt in (
            lambda: export_run(run, tmp_path / "b.safetensors", form="delta"),
            lambda: sample_run(run, count=1, before=True, output=tmp_path / "x.png"),
        ):
            with pytest.raises(ModelError, match="not the model this run began with"):
                attempt()


def test_the_given_recipe_goes_on_where_the_runs_own_is_damaged(run, tiny_model, capsys):
    reworded(run, "forget: 0", "forget: 2")
    quick = {"evaluate": {"every": 0, "final": 0, "teacher_steps": 2}}
    train(small_recipe(tiny_model, run, steps=5, **quick), quiet=True)
    assert "it is written anew" in capsys.readouterr().err
    assert load_recipe(run / "recipe.yaml").forget == 0
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "nonsense: [")
    train(small_recipe(tiny_model, run, steps=6, **quick), quiet=True)
    assert load_recipe(run / "recipe.yaml").steps == 6
    with pytest.raises(OutputError, match=r"another run \(forget is 0 there, 2 here\)"):
        train(small_recipe(tiny_model, run, forget=2), quiet=True)


def sampled_bits(path, count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(8 * path.stat().st_size) for _ in range(count)]


def test_flipped_bits_of_recipe_inputs_and_figures(run, tmp_path):
    """Found, or without any effect on what is read."""
    readers = {
        "recipe.yaml": lambda: sample_run(run, count=1, output=tmp_path / "a.png"),
        "inputs.json": lambda: read_inputs(run),
        "metrics.json": lambda: read_metrics(run),
    }
    found = 0
    for name, read in readers.items():
        want = load_recipe(run / name) if name == "recipe.yaml" else json.loads((run / name).read_text())
        for bit in sampled_bits(run / name, 4 if name == "recipe.yaml" else 60):
            with flipped(run / name, bit):
                try:
                    read()
                except PeckerError:
                    found += 1
                    continue
                now = load_recipe(run / name) if name == "recipe.yaml" else json.loads((run / name).read_text())
                if name == "recipe.yaml":
                    assert now == want, bit
                else:
                    changed = {key for key in want.keys() | now.keys() if want.get(key) != now.get(key)}
                    assert files.SEAL in changed, (name, bit)  # its key alone, which earlier versions did not have
    assert found > 110


def test_figures_that_were_changed_are_on_no_card(run, tmp_path, capsys):
    text = (run / "metrics.json").read_text()
    metrics = json.loads(text)
    metrics["after"]["ua"], metrics["after"]["intervals"]["ua"] = 1.0, [0.99, 1.0]
    (run / "metrics.json").write_text(json.dumps(metrics))
    card = (export_run(run, tmp_path / "out") / "README.md").read_text()
    assert "Not evaluated" in card
    assert "nothing is taken from it" in capsys.readouterr().err
    assert "metrics.json: damaged or edited" in write_report(run).read_text()
    assert evaluate_run(run, samples=12)["before"] is None
    del metrics[files.SEAL]
    files.write_sealed(run / "metrics.json", {**metrics, "recipe_sha256": "0" * 64})
    with pytest.raises(DataError, match="the figures of another run"):
        read_metrics(run, "1" * 64)
    assert "Not evaluated" in (export_run(run, tmp_path / "out") / "README.md").read_text()
    del metrics["recipe_sha256"]
    files.write_json(run / "metrics.json", metrics)  # of an earlier version: believed
    assert read_metrics(run)["after"]["ua"] == 1.0


@pytest.mark.parametrize("each", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_one_bit_of_the_pipeline_is_found_whenever_it_is_loaded(run, each):
    checked = sorted(path for path in (run / "pipeline").rglob("*") if path.is_file() and path.name != "README.md")
    assert {str(path.relative_to(run)) for path in checked} >= {UNET, "pipeline/scheduler/scheduler_config.json"}
    for path in checked:
        for bit in sampled_bits(path, each):
            with flipped(path, bit), pytest.raises(ModelError, match=re.escape(path.name)):
                check_exported(run / "pipeline", "export it again")
    check_exported(run / "pipeline", "")


def test_a_damaged_pipeline_is_drawn_from_by_no_verb_and_exported_again(run, tmp_path, tiny_model):
    bit = 8 * (run / UNET).stat().st_size - 100
    want = (run / UNET).read_bytes()
    with flipped(run / UNET, bit):
        for attempt in (
            lambda: sample_run(run, count=1, output=tmp_path / "a.png"),
            lambda: evaluate_run(run, samples=12),
            lambda: evaluate_run(run, samples=12, everything=True),
            lambda: train(small_recipe(tiny_model, tmp_path / "next", generator=str(run / "pipeline")), quiet=True),
        ):
            with pytest.raises(ModelError, match=r"model\.safetensors: damaged \(its sha256 is not the manifest's\)"):
                attempt()
        export_run(run)
        assert (run / UNET).read_bytes() == want
    with flipped(run / UNET, bit):
        assert train(small_recipe(tiny_model, run), quiet=True).metrics["step"] == 4  # finished, but for that
        assert (run / UNET).read_bytes() == want
    (run / "pipeline" / "model.json").write_text("{")
    export_run(run)
    (run / "pipeline" / "README.md").write_text("my own words")
    sample_run(run, count=1, output=tmp_path / "b.png")


def test_a_pipeline_of_an_earlier_version_is_compared_with_its_model_json(run, tmp_path):
    (run / "pipeline" / files.MANIFEST).unlink()
    sample_run(run, count=1, output=tmp_path / "a.png")
    with (
        flipped(run / UNET, 8 * (run / UNET).stat().st_size - 100),
        pytest.raises(ModelError, match=r"not the weights that model\.json beside it names"),
    ):
        sample_run(run, count=1, output=tmp_path / "b.png")
    about = run / "pipeline" / "model.json"
    from pecker_fast.networks import load_unet

    first = files.sha256_tensors(load_unet(run / "pipeline/unet").named_parameters())
    files.write_json(about, json.loads(about.read_text()) | {"weights_sha256": first})  # as class models had it once
    sample_run(run, count=1, output=tmp_path / "c.png")
    files.write_json(about, {"kind": "one-step generator", "null_class": 3})  # and before that
    sample_run(run, count=1, output=tmp_path / "d.png")
