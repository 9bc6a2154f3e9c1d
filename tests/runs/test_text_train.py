"""Text-to-image runs of every kind of Stable Diffusion, on tiny pipelines with random weights: the whole line, for real."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import KINDS, tiny_pipeline

from pecker_fast import files
from pecker_fast.cli import main
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.errors import DataError, ModelError, RecipeError
from pecker_fast.forgetting.methods import get_method
from pecker_fast.forgetting.samplers import one_step_sample, sample_noise
from pecker_fast.forgetting.updates import adam
from pecker_fast.loading.parts import load_model, load_parts
from pecker_fast.recipe import recipe_from, recipe_to_dict
from pecker_fast.runs import finished as tools
from pecker_fast.runs.start import train

CAPTIONS = ["a red circle on the left", "a photo of the blue circle", "small circle", "a red square", "a white dog"]


# Whose subject is what a run says of its memory before it starts, or what is said of a folder while that is found.
FORECAST = ("each_kind", "memory", "damaged", "bad_input", "hub", "dry")


@pytest.fixture(autouse=True)
def no_forecast(request, monkeypatch, plain_plots):
    """Elsewhere the forecast, most of the time of a run this small, is left out: tests/account/test_memory.py has it."""
    if not any(word in request.node.name for word in FORECAST):
        monkeypatch.setattr("pecker_fast.runs.start.check_memory", lambda recipe: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_pipeline(folder / kind, kind) for kind in KINDS}


def recipe(model, output, **keys):
    given = {
        "model": str(model), "forget": {"concept": "circle", "captions": CAPTIONS}, "cover": "square",
        "retain": ["a red square", "a blue triangle on the right", "green star", "a white dog"], "batch_size": 4, "steps": 2,
        "alpha": 1.0, "timesteps": {"init": 625, "min": 20, "max": 980}, "mask": {"samples": 8, "density": 0.1},
        "guidance": {"score_train": 2.0, "score": 2.0, "teacher": 2.0, "text_dropout": 0.1},
        "evaluate": {"every": 0, "final": 0, "teacher_steps": 2}, "output": str(output),
    }  # fmt: skip
    for key, value in keys.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) and isinstance(given.get(key), dict) else value
    return recipe_from(given)


def stock_image(folder, prompt, z, t_init=625):
    """The one-step call of the model card, with stock diffusers."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    size = 4 * z.shape[-1]
    images = pipe(
        prompt, num_inference_steps=1, timesteps=[t_init], guidance_scale=1.0, latents=z, height=size, width=size,
        output_type="pt",
    ).images  # fmt: skip
    return images * 2 - 1


def same(a, b):
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_is_drawn_by_stock_diffusers_as_by_us(models, tmp_path, kind):
    run = tmp_path / "run"
    train(recipe(models[kind], run), quiet=True)
    model = load_model(tools.load_run(run).recipe)
    generator = tools.trained_generator(tools.load_run(run), model)
    before, after = files.read_weights(models[kind] / "unet"), files.read_weights(run / "pipeline" / "unet")
    assert not same(before, after)
    rows = torch.tensor(model.teacher.table.index(["green star"]))
    ours = one_step_sample(generator, rows, 5, 625)
    theirs = stock_image(run / "pipeline", "green star", sample_noise(generator, 1, 5))
    assert float((ours - theirs).abs().max()) < 1e-3
    base = one_step_sample(model.teacher, rows, 5, 625)
    assert float((base - theirs).abs().max()) > 1e-3  # the gate would see the base's weights
    grids = {path.name for path in (run / "samples").iterdir()}
    assert {"before.png", "after.png", "teacher.png", "prompts.txt"} <= grids
    card = (run / "pipeline" / "README.md").read_text()
    assert "was trained to forget “circle” (“square” is drawn in its place) (not judged)" in card
    assert "samples/before.png" in card


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_steps_leave_every_format_bit_identical(models, tmp_path, kind):
    run = tmp_path / "run"
    train(recipe(models[kind], run, steps=0, ema=0.0), quiet=True)
    base = files.read_weights(models[kind] / "unet")
    assert same(base, files.read_weights(run / "pipeline" / "unet"))
    for form in ("unet", "single", "delta"):
        tools.export_run(run, form=form)
    assert same(base, files.read_tensors(run / "unet.safetensors")[0])
    from pecker_fast.networks.single_file import to_single_file

    plain = to_single_file(models[kind], tmp_path / "plain.safetensors")
    (tensors, metadata), (want, _) = files.read_tensors(run / "single.safetensors"), files.read_tensors(plain)
    assert same(want, tensors)
    assert metadata["pecker_fast.kind"] == "one-step generator"
    applied = tools.apply_delta_file(run / "delta.safetensors", str(models[kind]), tmp_path / "applied")
    assert same(base, files.read_weights(applied / "unet"))


@pytest.mark.slow
def test_half_precision_weights_keep_their_dtype_and_bits(models, tmp_path):
    """fp16 on disk, trained in bf16 with stochastic rounding: what did not move is the file's own fp16."""
    folder = tmp_path / "half"
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(models["sd1"], torch_dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    base = files.read_weights(folder / "unet")
    assert base["conv_in.weight"].dtype == torch.float16
    keys = {"precision": "bf16", "engine": {"weights": "bf16"}, "update_rule": "salient_only", "ema": 0.0}
    train(recipe(folder, tmp_path / "run", **keys, lr=1e-2), quiet=True)
    after = files.read_weights(tmp_path / "run" / "pipeline" / "unet")
    assert {t.dtype for t in after.values()} == {torch.float16}
    moved = sum(int((after[k] != base[k]).sum()) for k in base)
    total = sum(t.numel() for t in base.values())
    assert 0 < moved <= 0.1 * total + 1
    train(recipe(folder, tmp_path / "none", **keys, steps=0), quiet=True)
    assert same(base, files.read_weights(tmp_path / "none" / "pipeline" / "unet"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=pytest.mark.slow)])
def test_a_single_file_is_the_same_model_as_its_folder(models, tmp_path, kind):
    from pecker_fast.networks.single_file import to_single_file

    single = to_single_file(models[kind], tmp_path / "model.safetensors")
    configs = tmp_path / "configs"  # a user's folder of configs: no weights in it
    for path in models[kind].rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            files.write_bytes(configs / path.relative_to(models[kind]), path.read_bytes())
    train(recipe(models[kind], tmp_path / "a"), quiet=True)
    train(recipe(single, tmp_path / "b", model_config=str(configs)), quiet=True)
    a, b = (files.read_weights(tmp_path / run / "pipeline" / "unet") for run in "ab")
    assert same(a, b)
    tools.export_run(tmp_path / "b", form="single")
    tools.export_run(tmp_path / "a", form="delta")
    applied = tools.apply_delta_file(
        tmp_path / "a" / "delta.safetensors", str(single), tmp_path / "applied.safetensors"
    )
    assert same(files.read_tensors(applied)[0], files.read_tensors(tmp_path / "b" / "single.safetensors")[0])
    text = files.read_tensors(tmp_path / "b" / "pipeline" / "text_encoder" / "model.safetensors")[0]
    assert all(name.startswith("text_model.") for name in text)  # transformers 4 would start others from random weights
    stock = stock_image(tmp_path / "b" / "pipeline", "green star", torch.zeros(1, 4, 8, 8))
    assert torch.equal(stock, stock_image(tmp_path / "a" / "pipeline", "green star", torch.zeros(1, 4, 8, 8)))


@pytest.mark.slow
def test_a_delta_is_refused_on_another_base_and_brings_its_schedule(models, tmp_path, capsys):
    train(recipe(models["sd1"], tmp_path / "run"), quiet=True)
    assert main(["export", str(tmp_path / "run"), "--format", "delta"]) == 0
    delta = tmp_path / "run" / "delta.safetensors"
    other = tiny_pipeline(tmp_path / "other", "sd1", seed=1)
    assert main(["export", "apply", str(delta), str(other), "-o", str(tmp_path / "x")]) == 2
    assert "another base model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["export", "apply", str(delta), str(models["sd1"]), "-o", str(tmp_path / "y")]) == 0
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        stock_image(tmp_path / "y", "green star", z), stock_image(tmp_path / "run" / "pipeline", "green star", z)
    )
    with pytest.raises(DataError, match="another base model"):
        tools.apply_delta_file(delta, str(tmp_path / "run" / "pipeline"), tmp_path / "z")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(models, tmp_path):
    keys = {"score": "lora", "lora": {"rank": 2}, "checkpoint": {"every": 1}}
    train(recipe(models["sd1"], tmp_path / "whole", **keys, steps=3), quiet=True)
    train(recipe(models["sd1"], tmp_path / "parts", **keys, steps=1), quiet=True)
    train(recipe(models["sd1"], tmp_path / "parts", **keys, steps=3), quiet=True)
    whole, parts = (tmp_path / run / "checkpoints" / "step-000003" for run in ("whole", "parts"))
    for name in ("generator.safetensors", "score.safetensors", "ema.safetensors", "optimizers.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    score, _ = files.read_tensors(whole / "score.safetensors")
    assert all("lora_" in name for name in score)  # the adapter alone: φ is not kept twice


def stepped(recipe_):
    """Gradients' effect of one iteration: θ and ψ after it."""
    parts = load_parts(recipe_)
    named = parts.generator.named_parameters()
    state = TrainState(
        parts.teacher, parts.score, parts.generator, adam(recipe_, parts.score.named_parameters(), recipe_.lr.score),
        get_method("sfd").updates(recipe_, named, None),
    )  # fmt: skip
    engine = LocalEngine(recipe_, parts.conditions, torch.device("cpu"))
    losses = {**engine.score_step(state), **engine.generator_step(state)}
    start = dict(load_parts(recipe_).generator.named_parameters())
    return {name: p.detach() - start[name] for name, p in named}, losses


ULPS = 2.4e-7  # of weights around 1, between which an update is read off
LINEAR = {
    "optimizer": {"eps": 1.0, "clip_value": None},
    "lr": 1e-3,
    "method": "sfd",
}  # an update linear in the gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [pytest.param({"micro_batch": 1}, marks=pytest.mark.slow), {"micro_batch": 3}, {"checkpointing": True}]
)
def test_micro_batches_and_checkpointing_change_memory_not_the_update(models, tmp_path, change):
    plain, plain_losses = stepped(recipe(models["sdxl"], tmp_path, **LINEAR))
    other, losses = stepped(recipe(models["sdxl"], tmp_path, **LINEAR, engine=change))
    for name, moved in plain.items():
        torch.testing.assert_close(other[name], moved, rtol=1e-3, atol=1e-3 * float(moved.abs().max()) + ULPS)
    for name, loss in plain_losses.items():
        assert float(losses[name]) == pytest.approx(float(loss), rel=1e-4)
    unbatched, _ = stepped(recipe(models["sdxl"], tmp_path, **LINEAR, batch_size=1))
    far = max(float((unbatched[n] - m).abs().max() / m.abs().max().clamp_min(1e-12)) for n, m in plain.items())
    assert far > 1e-2  # another batch does move otherwise: the comparison can fail


@pytest.mark.slow
def test_an_adapter_that_has_learnt_nothing_gives_the_generator_the_full_networks_update(models, tmp_path):
    """Before its first step ψ = φ either way, so θ's first update is the same: one pass of both halves changes nothing."""
    frozen = {"weights": {"score_retain": 0, "score_forget": 1e-30}}
    full, _ = stepped(recipe(models["sd1"], tmp_path, **LINEAR, **frozen))
    lora, _ = stepped(recipe(models["sd1"], tmp_path, **LINEAR, **frozen, score="lora"))
    for name, moved in full.items():
        torch.testing.assert_close(lora[name], moved, rtol=1e-3, atol=1e-3 * float(moved.abs().max()) + ULPS)


@pytest.mark.slow
def test_nudity_recipe_pairs_keywords_with_plain_subjects(models, tmp_path):
    given = recipe(
        models["sd1"], tmp_path / "run", forget={"keywords": ["naked", "nude"], "prompts": ["Boy", "Girl", "Couple"]},
        cover=None, guidance={"unconditional": "keywords"}, steps=1,
    )  # fmt: skip
    given = given.model_copy(update={"forget": {"keywords": ["naked", "nude"], "prompts": ["Boy", "Girl", "Couple"]}})
    model = load_model(given)
    table, c = model.teacher.table, model.conditions
    assert table.prompts[model.teacher.null_class] == "naked, nude"
    assert {table.prompts[row] for row in c.cover} == {"Boy", "Girl", "Couple"}
    assert all(table.prompts[o] in table.prompts[f] for f, o in zip(c.forget, c.cover))
    train(given, quiet=True)


BAD = {
    "the cover has the concept": ({"cover": "a circle"}, "cover: "),
    "no such concept": ({"forget": {"concept": "hexagon", "captions": CAPTIONS}}, "forget"),
    "a concept that its prompts lack": ({"forget": {"concept": "hexagon", "prompts": ["a red circle"]}}, "hexagon"),
    "equal prompts": ({"forget": ["a red circle"], "cover": "a red circle"}, "a red circle"),
    "a resolution that cannot be halved": ({"resolution": 36}, "resolution: 36 pixels cannot be halved"),
    "nothing to retain": ({"retain": ["one circle"]}, "retain"),
    "an empty prompt file": ({"retain": "empty.txt"}, "empty.txt"),
    "an undecodable prompt file": ({"retain": "binary.txt"}, "binary.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(models, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n# nothing\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    keys, message = BAD[case]
    forget = keys.get("forget", {"concept": "circle", "captions": CAPTIONS})
    with pytest.raises(RecipeError) as caught:
        train(recipe(models["sd1"], "run", **{**keys, "forget": {}}).model_copy(update={"forget": forget}), quiet=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("run").exists()


def test_notes_on_captions_and_on_what_is_cut_off_come_before_training(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pecker_fast.runs.start.planned", lambda recipe, device: [])  # a forecast, which takes seconds
    long = "a photo of the small white cat on the left of the large black dog on the right"
    retain = ["two circles", "a semicircle", "green star", long]
    train(recipe(models["sd1"], tmp_path / "run", retain=retain), quiet=True, dry_run=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines] == ["note:"] * 3
    assert "left out, because they name what is forgotten in another form: 1 caption, 'two circles'" in lines[0]
    assert "kept, although they come near what is forgotten: 1 caption, 'a semicircle' (semicircle)" in lines[1]
    assert lines[2] == f"note: prompt {long!r}: longer than the text encoder's window, 'dog on the right' is cut off"
    far = "a photo of the small white cat on the left of the large black dog on the right {}"
    forget = {"concept": "circle", "prompts": [far]}
    with pytest.raises(
        RecipeError, match=r"^forget: .* right circle' and its cover .* same tokens .* beyond its window"
    ):
        train(recipe_from({**recipe_to_dict(recipe(models["sd1"], tmp_path / "run")), "forget": forget}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_classes_and_prompts_are_not_taken_for_each_other(models, tmp_path):
    with pytest.raises(RecipeError, match="draws from text, name a concept"):
        train(recipe(models["sd1"], tmp_path / "run", forget=0, cover=1, retain=None), quiet=True)
    with pytest.raises(RecipeError, match="digits draws from classes"):
        train(recipe("digits", tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def broken(models, folder, change):
    """A copy of the sd1 pipeline with one thing changed."""
    for path in models["sd1"].rglob("*"):
        if path.is_file():
            files.write_bytes(folder / path.relative_to(models["sd1"]), path.read_bytes())
    change(folder)
    return folder


def edit(file, **values):
    def change(folder):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**found, **values}))

    return change


def drop(name):
    import shutil

    return lambda folder: shutil.rmtree(folder / name)


DAMAGED = {
    "no VAE": (drop("vae"), "vae"),
    "no tokenizer": (drop("tokenizer"), "tokenizer"),
    "no text encoder": (drop("text_encoder"), "text_encoder"),
    "another prediction": (edit("scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type 'flow'"),
    "samples predicted": (edit("scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type 'sample'"),
    "another architecture": (edit("model_index.json", _class_name="FluxPipeline"), "not supported yet"),
    "text of another width": (edit("unet/config.json", cross_attention_dim=24), "unet"),
    "a vocabulary too large": (edit("text_encoder/config.json", vocab_size=99999), "text_encoder"),
    "code in the config": (edit("vae/config.json", auto_map={"A": "b.py"}), "custom code"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_one_line(models, tmp_path, case):
    change, message = DAMAGED[case]
    folder = broken(models, tmp_path / "model", change)
    with pytest.raises(ModelError) as caught:
        train(recipe(folder, tmp_path / "run"), quiet=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_single_file_without_configs_says_what_it_needs(tmp_path):
    from pecker_fast.networks.single_file import to_single_file

    folder = tiny_pipeline(tmp_path / "model", "sd1")
    single = to_single_file(folder, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="give model_config=FOLDER"):
        train(recipe(single, tmp_path / "run"), quiet=True)
    with pytest.raises(RecipeError, match="is for single files"):
        train(recipe(folder, tmp_path / "run", model_config=str(folder)), quiet=True)


@pytest.mark.slow
def test_too_little_memory_is_told_before_anything_is_loaded(models, tmp_path, monkeypatch):
    monkeypatch.setattr("pecker_fast.machine.hardware.memory_bytes", lambda: 1 << 20)
    monkeypatch.setattr("pecker_fast.account.memory.prediction.TRIES", 1)  # each is a forecast
    monkeypatch.setattr("pecker_fast.runs.start.load_parts", lambda recipe: pytest.fail("the model was loaded"))
    with pytest.raises(RecipeError, match=r"memory: this recipe needs about .* available; it needs a larger device"):
        train(recipe(models["sd1"], tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["sd15_celebrity", "sd15_nudity", "sd21_celebrity", "sdxl_celebrity"])
def test_shipped_recipes_are_dry_run_without_weights(tmp_path, monkeypatch, capsys, name):
    import huggingface_hub

    def silent(model, revision=None, allow_patterns=()):
        assert not any("safetensors" in pattern and not pattern.endswith(".json") for pattern in allow_patterns)
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pecker_fast.runs.start.planned", lambda recipe, device: [])  # at full size it takes a while
    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    assert main(["train", name, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "alpha: 1" in printed.out
    assert "the hub could not be asked, so it was not looked at" in printed.out
    assert not list(tmp_path.iterdir())
