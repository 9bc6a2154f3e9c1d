"""Overrides of the command line: texts as they are written, numbers and lists by their keys, ~ as the home folder."""

from pathlib import Path

import pytest

from pecker_fast.errors import RecipeError
from pecker_fast.recipe import load_recipe, recipe_to_yaml

TEXTS = [
    "exp #2", "#MeToo", "*STARS", "@handle", "&co", "!now", "%x", '"Odd Al" Yonder', "'tis", "50 Cent", "1984", "2024", "Dr. No",
    "a: b", "[sic", "{a", "- x", "? y", "| z", "> w", "true", "1e3", "0x10", "x\\ty", "`q`", "a=b", "off", "null and void",
    "Zoë", "猫",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_taken_as_they_are_written(text, tmp_path):
    recipe = load_recipe(
        "shapes", [f"output=runs/{text}", f"forget.concept={text}", f"cover={text}", f" model ={text}"]
    )
    assert recipe.output == f"runs/{text}"
    assert recipe.forget == {"concept": text, "captions": "captions.txt"}
    assert recipe.cover == text
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(recipe))
    assert load_recipe(file) == recipe


def test_null_is_nothing_where_the_key_may_be_null():
    recipe = load_recipe(
        "shapes", ["generator=null", "evaluate.judge=null", "forget.concept=null", "output=null", "resume=null"]
    )
    assert (recipe.generator, recipe.evaluate.judge) == (None, None)
    assert (recipe.forget["concept"], recipe.output, recipe.resume) == ("null", "null", "null")
    assert load_recipe("sd15_nudity", ["cover=null"]).cover is None
    assert load_recipe("digits", ["retain=null", "mask.threshold=null", "generator="]).retain is None


CIRCLE = {"concept": "circle", "captions": "captions.txt"}
YEAR = {"concept": "1984", "prompts": ["1984", "on"]}
TWO = [{"keywords": ["k"], "prompts": ["p"]}, {"concept": "c", "prompts": ["c"]}]
BOTH = "forget=[{keywords: [k], prompts: [p]}, {concept: c, prompts: [c]}]"


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("digits", ["forget=3", "cover=[8]", "retain=[1, 2]"], (3, [8], [1, 2])),
        ("shapes", ["forget=1984", "cover=2024"], ("1984", "2024", "captions.txt")),
        ("shapes", ['retain=["a #1", "b, c", 1984]'], (CIRCLE, "square", ["a #1", "b, c", "1984"])),
        (None, ["forget={concept: 1984, prompts: [1984, on]}", "cover=2024", "retain=[1]"], (YEAR, "2024", ["1"])),
        (None, ["cover=1984", "retain=[x]", "forget=#MeToo"], ("#MeToo", "1984", ["x"])),
        (None, [BOTH, "cover=[null, 5]", "retain=[x]"], (TWO, [None, "5"], ["x"])),
    ],
)
def test_classes_are_numbers_and_prompts_are_texts(name, overrides, expected):
    recipe = load_recipe(name, overrides)
    assert (recipe.forget, recipe.cover, recipe.retain) == expected


PATHS = ("model", "model_config", "generator", "output", "resume", "evaluate.judge", "mask.data", "engine.deepspeed")


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe("shapes", [f"{key}=~/some where" for key in PATHS])
    found = [recipe.model, recipe.config_folder, recipe.generator, recipe.output, recipe.resume]
    found += [recipe.evaluate.judge, recipe.mask.data, recipe.engine.deepspeed]
    assert found == [str(tmp_path / "some where")] * len(PATHS)
    given = ["forget.captions=~/f.csv", "retain=~/r.txt", "evaluate.prompts=~/e.txt", "cover=~ tilde"]
    recipe = load_recipe("shapes", given)
    assert [recipe.forget["captions"], recipe.retain, recipe.evaluate.prompts, recipe.cover] == [
        f"{tmp_path}/f.csv", f"{tmp_path}/r.txt", f"{tmp_path}/e.txt", "~ tilde",
    ]  # fmt: skip
    Path(tmp_path / "r.yaml").write_text("output: ~/runs/x\nmodel: ~\n")
    with pytest.raises(RecipeError, match="model: expected text, got nothing"):
        load_recipe("~/r.yaml")
    assert load_recipe("~/r.yaml", ["model=~"]).output == f"{tmp_path}/runs/x"
    assert load_recipe("~/r.yaml", ["model=~"]).model == str(tmp_path)
