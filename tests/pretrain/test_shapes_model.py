"""The shapes model that ships: what it holds, how well it draws, and what forgetting a word of it takes."""

import json

import pytest
import torch

from pecker_fast import files
from pecker_fast.evaluate.words import load_word_judge
from pecker_fast.loading.parts import load_model, load_parts
from pecker_fast.recipe import load_recipe
from pecker_fast.runs import finished as tools
from pecker_fast.runs.prompt_judging import grid_rows, judging_of
from pecker_fast.runs.start import train

FOLDER = files.resolve_model("shapes")
QUICK = [
    "steps=2",
    "batch_size=8",
    "mask.samples=16",
    "evaluate.every=0",
    "evaluate.final=60",
    "evaluate.teacher_steps=2",
]


def test_the_shipped_model_is_small_and_stock_diffusers_loads_it():
    from diffusers import StableDiffusionPipeline

    paths = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= 8 << 20
    assert {path.suffix for path in paths} <= {".json", ".safetensors", ".txt"}
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    assert {type(part).__name__ for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {
        "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel",
    }  # fmt: skip


def test_captions_to_judge_by_are_not_those_to_train_with():
    train_with, held_out = (set((FOLDER / f).read_text().splitlines()) for f in ("captions.txt", "held_out.txt"))
    assert not train_with & held_out
    judge = load_word_judge(FOLDER / "judge")
    for attribute in ("shape", "colour"):
        for word in judge.attributes[attribute]:
            assert sum(judge.expected(text).get(attribute) == word for text in held_out) >= 200, word
            assert any(judge.expected(text).get(attribute) == word for text in train_with), word


@pytest.mark.slow
def test_the_one_step_generator_obeys_and_the_judge_would_see_if_it_did_not():
    recipe = load_recipe("shapes")
    parts = load_parts(recipe)
    judging = judging_of(recipe, parts)
    before = judging.figures(judging.one_step(parts.generator), 200)
    assert before["ua"] < 0.1
    for attribute in ("shape", "colour", "background"):
        assert before["retain_obeyed"][attribute] > 0.9, attribute
    scrambled = judging.figures(lambda rows, seed: judging.one_step(parts.generator)(rows.flip(0), seed), 200)
    assert scrambled["retain_obeyed"]["colour"] < 0.6


@pytest.mark.slow
def test_a_short_run_leaves_figures_grids_and_other_words_need_no_other_key(tmp_path):
    output = tmp_path / "run"
    train(load_recipe("shapes_plain", [*QUICK, "forget.concept=red", "cover=blue", f"output={output}"]), quiet=True)
    metrics = json.loads((output / "metrics.json").read_text())
    for key in ("ua", "cover_rate", "retain_accuracy", "ira", "cra", "fid", "precision", "per_class", "obeyed"):
        assert key in metrics["after"], key
    assert "red" in metrics["after"]["per_class"]
    memory = metrics["cost"]["memory"]
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.15)
    assert "red" in (output / "samples" / "prompts.txt").read_text()
    again = tools.evaluate_run(output, samples=60)
    assert again["after"]["ua"] == metrics["after"]["ua"]
    figures = tools.evaluate_protocol(output, "celebrity", [f"{FOLDER / 'judge'}:red"], seeds=1)
    assert figures["images"] > 0
    figures = tools.evaluate_protocol(output, "i2p", [f"{FOLDER / 'judge'}:red", f"{FOLDER / 'judge'}:star"], seeds=1)
    assert 0 <= figures["sample_probability"] <= 1
    assert tools.evaluate_protocol(output, "classes", samples=60)["ua"] == metrics["after"]["ua"]


@pytest.mark.slow
def test_the_memory_of_a_run_with_an_adapter_is_predicted(tmp_path):
    keys = [*QUICK, "score=lora", "evaluate.final=0", f"output={tmp_path / 'run'}"]
    train(load_recipe("shapes_plain", keys), quiet=True)
    memory = json.loads((tmp_path / "run" / "metrics.json").read_text())["cost"]["memory"]
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.15)


def test_grid_has_all_kinds_of_prompts():
    model = load_model(load_recipe("shapes"))
    rows = grid_rows(model.text.judged, model.teacher.table)
    kinds = [kind for _, kind in rows]
    assert set(kinds) == {"forget", "cover", "neighbour", "retain"}
    forgotten = {row for row, kind in rows if kind == "forget"}
    assert all("circle" in model.teacher.table.prompts[row] for row in forgotten)
    assert not any("circle" in model.teacher.table.prompts[row] for row, kind in rows if kind != "forget")


@pytest.mark.slow
def test_the_recipe_forgets_circles_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    train(load_recipe("shapes", [f"output={tmp_path / 'run'}"]), quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    after, teacher = metrics["after"], metrics["teacher"]
    assert after["ua"] >= 0.98
    assert after["cover_rate"] >= 0.95
    assert min(after["obeyed"][attribute] for attribute in ("colour", "background")) >= 0.95
    for word in ("square", "triangle", "star", "cross", "red", "green", "blue", "yellow", "purple"):
        assert after["per_class"][word] >= teacher["per_class"][word] - 0.02, word
