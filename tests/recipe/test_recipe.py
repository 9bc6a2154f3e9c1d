"""Recipes: what loads, what is refused, and that each refusal is one line naming key and remedy."""

import math

import pytest

from pecker_fast.errors import RecipeError
from pecker_fast.recipe import (
    Recipe,
    load_recipe,
    recipe_from,
    recipe_help,
    recipe_to_dict,
    recipe_to_yaml,
    shipped_recipes,
)
from pecker_fast.recipe.errors import closest, suggest_key
from pecker_fast.records.run_folder import trajectory_sha256


def refusal(source, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert "Traceback" not in message
    return message


OVERRIDE_ERRORS = [
    ("mask.densty=0.1", "override mask.densty: unknown key, did you mean mask.density?"),
    ("msk.density=0.1", "override msk.density: unknown key, did you mean mask.density?"),
    ("density=0.1", "override density: unknown key, did you mean mask.density?"),
    ("batchsize=3", "override batchsize: unknown key, did you mean batch_size?"),
    ("lr.generatr=1e-4", "override lr.generatr: unknown key, did you mean lr.generator?"),
    ("wieghts.forget=1", "override wieghts.forget: unknown key, did you mean weights.forget?"),
    ("zzzzzz=1", "override zzzzzz: unknown key; `pecker-fast recipes keys` lists them"),
    ("a.b.c=1", "override a.b.c: unknown key; `pecker-fast recipes keys` lists them"),
    ("steps=abc", "override steps: expected a whole number of at least 0, got 'abc'"),
    ("steps=true", "override steps: expected a whole number of at least 0, got true"),
    ("steps=5.0", "override steps: expected a whole number of at least 0, got 5.0"),
    ("steps=", "override steps: expected a whole number of at least 0, got nothing (null)"),
    ("steps=-1", "override steps: expected a number of at least 0, got -1"),
    ("distill_steps=-5", "override distill_steps: expected a number of at least 0, got -5"),
    ("steps.foo=3", "override steps: expected a whole number of at least 0, got {'foo': 3}"),
    ("steps=" + "9" * 5000, "override steps: holds a number too long to be read"),
    ("batch_size=0", "override batch_size: expected a number of at least 1, got 0"),
    ("batch_size=[64]", "override batch_size: expected a whole number of at least 1, got [64]"),
    ("lr=0", "override lr: expected a number in (0, 1], or {generator: …, score: …}, got 0"),
    ("lr=-1e-4", "override lr: expected a number in (0, 1], or {generator: …, score: …}, got -0.0001"),
    ("lr=2", "override lr: expected a number in (0, 1], or {generator: …, score: …}, got 2"),
    ("lr=.nan", "override lr: expected a number in (0, 1], or {generator: …, score: …}, got nan"),
    ("lr=fast", "override lr: expected a number in (0, 1], or {generator: …, score: …}, got 'fast'"),
    ("lr.score=7", "override lr.score: expected a number in (0, 1], got 7"),
    ("lr.score=.inf", "override lr.score: expected a number in (0, 1], got inf"),
    ("mask.density=0", "override mask.density: expected a number in (0, 1], got 0"),
    ("mask.density=1.5", "override mask.density: expected a number in (0, 1], got 1.5"),
    ("mask.density=-.1", "override mask.density: expected a number in (0, 1], got -0.1"),
    ("mask.density=.nan", "override mask.density: expected a number in (0, 1], got nan"),
    ("mask.density=nan", "override mask.density: expected a number in (0, 1], got 'nan'"),
    ("mask.density=true", "override mask.density: expected a number in (0, 1], got true"),
    ("mask.tile=[8]", "override mask.tile: expected 2 values, got [8]"),
    ("mask=3", "override mask: expected a section of `key: value` lines, got 3"),
    (
        "mask.source=salency",
        "override mask.source: expected one of saliency, random, names, none, got 'salency'; did you mean saliency?",
    ),
    ("mask.structure=block", "override mask.structure: expected one of element, row, tile, tensor, got 'block'"),
    (
        "method=saluun",
        "override method: expected one of pecker, sfd, spare, salun, esd, sa, uce, relabel, got 'saluun'; did you mean salun?",
    ),
    ("update_rule=both", "override update_rule: expected one of differentiated, salient_only, alternating, got 'both'"),
    ("precision=fp16", "override precision: expected one of fp32, bf16, got 'fp16'"),
    ("detach_score=1", "override detach_score: expected true or false, got 1"),
    ("model=", "override model: string should have at least 1 character"),
    ("output=a\0b", "override 'output': holds the character '\\x00', which is no text"),
    ("steps=5 # more", "override steps: expected a value without a comment, got '5 # more'"),
    (
        "output=~nobody-at-all/x",
        "override output: there is no home folder '~nobody-at-all'; write the folder's name out",
    ),
    ("cover=0", "override cover: class 0 is to be forgotten itself; choose a class outside forget"),
    ("retain=[0, 2]", "override retain: class 0 is to be forgotten; take it out of retain or out of forget"),
    ("cover=[1, 2]", "override cover: 2 classes for 1 forget classes; give one, or one for each"),
    ("forget=[]", "override forget: the list is empty; name at least one class"),
    ("forget=[2, 2]", "override forget: a class is named twice in [2, 2]"),
    ("forget=-1", "override forget: a class number is 0 or more, got -1"),
    ("forget=1.5", "override forget: expected a class number or a list of them, got 1.5"),
    ("forget=true", "override forget: expected a class number or a list of them, got true"),
    ("forget=[0, cat]", "override forget: expected a class number or a list of them, got 'cat'"),
    ("forget=null", "override forget: expected a class number or a list of them, got nothing (null)"),
    ("forget=a cat", "recipe: cover: names classes where forget names prompts"),
    ("timesteps.min=800", "override timesteps: min (800) must be below max (712)"),
    ("timesteps.max=0", "override timesteps.max: expected a number of at least 1, got 0"),
    ("timesteps.init=-1", "override timesteps.init: expected a number of at least 0, got -1"),
    ("null_class=-1", "override null_class: expected a number greater than or equal to 0, got -1"),
    ("optimizer.betas=[0, .9, 1]", "override optimizer.betas: expected 2 values, got [0, 0.9, 1]"),
    ("ema=1", "override ema: expected a number in [0, 1), got 1"),
    ("seed=-1", "override seed: expected a number of at least 0, got -1"),
    ("score=peft", "override score: expected one of full, lora, got 'peft'"),
    ("engine.weights=bf16", "override engine.weights: bf16 weights need precision=bf16"),
    ("steps=[", "override steps: line 1 column 2: while parsing a flow node"),
    ("steps=*x", "override steps: line 1 column 1: aliases are not part of a recipe"),
    ("steps=!!python/name:os.system x", "override steps: line 1 column 1: tags are not part of a recipe"),
    ("foo", "override 'foo': expected key=value, such as mask.density=0.1"),
    ("=3", "override '=3': expected key=value, such as mask.density=0.1"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDE_ERRORS, ids=[row[0][:30] for row in OVERRIDE_ERRORS])
def test_a_wrong_override_is_refused_in_one_line(override, message):
    assert refusal(None, [override]).startswith(message)


def test_an_override_inside_a_single_value_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 500\n")
    assert refusal(path, ["steps.foo=3"]) == "override steps.foo: steps is 500 in the recipe, not a section"


FILE_ERRORS = [
    (b"", "it is empty"),
    (b"# only a comment\n", "it is empty"),
    (b"- 1\n- 2\n", "holds a list"),
    (b"just text", "holds a str"),
    (b"model: [\n", "line 2 column 1"),
    (b"model: a\n  steps: 3\n", "line 2 column 8"),
    (b"\tsteps: 3", "line 1 column 1"),
    (b"\xff\xfe\x00", "not UTF-8 text (byte 0)"),
    (b"model: \x00", "not text"),
    (b"model: \x07", "line 1: not text"),
    (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8 text"),
    (b"steps: 1\nsteps: 2\n", "line 2 column 1: key 'steps' is given twice"),
    (b"mask: {density: .1, density: .2}", "line 1 column 21: key 'density' is given twice"),
    (b"forget: &x [0]\ncover: *x\n", "line 2 column 8: aliases are not part of a recipe"),
    (b"steps: !!python/object/apply:os.system [id]", "line 1 column 8: tags are not part of a recipe"),
    (b"? [1]\n: 2\n", "a key must be a word"),
    (b"a: 1\n---\nb: 2\n", "single document"),
    (b"<<: {steps: 1}", "<<: unknown key"),
    (b"1: 2", "1: unknown key"),
    (b"[" * 20000, "nested too deeply"),
    (b"mask: {densty: 0.1}", "mask.densty: unknown key, did you mean mask.density?"),
    (b"bach_size: 3\nsteps: x\n", "bach_size: unknown key, did you mean batch_size? (and 1 more)"),
    (b"steps: " + b"1" * (1 << 20), "too long for a text file"),
]


@pytest.mark.parametrize(("content", "message"), FILE_ERRORS, ids=[str(row[0][:25]) for row in FILE_ERRORS])
def test_a_wrong_file_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    text = refusal(path)
    assert message in text
    assert "mine.yaml" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digitz", "did you mean digits?"),
        ("no/such.yaml", "shipped recipes: "),
        ("x" * 5000, "no such recipe or file"),
        ("/", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("bad\0name", "no such recipe or file"),
    ],
)
def test_a_missing_recipe_is_refused_with_the_names_there_are(name, message):
    assert message in refusal(name)


def test_one_letter_typos_of_every_key_get_the_right_suggestion():
    keys = [key for key, *_ in recipe_help()]
    right = total = 0
    for key in keys:
        for i in range(key.rfind(".") + 1, len(key)):
            for typo in (key[:i] + key[i + 1 :], key[:i] + "q" + key[i + 1 :], key[:i] + "q" + key[i:]):
                if typo in keys or typo.endswith(".") or not typo:
                    continue
                total += 1
                right += suggest_key(typo, keys) == key
    assert total > 1000
    assert right / total >= 0.95


def test_closest_counts_letters_and_knows_when_all_are_far():
    assert closest("ploy", ["play", "ploys", "lop"]) in ("play", "ploys")
    assert closest("rl", ["lr", "ema"]) == "lr"
    assert closest("elephant", ["lr", "ema"]) is None
    assert closest("", ["lr"]) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E-4", 1e-4), ("+1.5e-3", 1.5e-3), (".5", 0.5), ("1.", 1.0), ("0x1", 1.0), ("1", 1.0),
    ],
)  # fmt: skip
def test_numbers_are_read_as_in_json(text, value):
    recipe = load_recipe(None, [f"lr={text}"])
    assert recipe.lr.generator == recipe.lr.score == value


@pytest.mark.parametrize("word", ["no", "off", "yes", "1:30", "2024-01-01", "None", "0o17"])
def test_words_that_yaml_1_1_takes_for_something_else_stay_words(word):
    assert load_recipe(None, [f"output={word}"]).output == word


def test_overrides_reach_into_sections_and_later_ones_win():
    mask = ["mask={density: .1, source: random}", "mask.density=.2"]
    recipe = load_recipe(None, ["lr=1e-5", "lr.score=3e-5", *mask, "steps=1", "steps=2"])
    assert (recipe.lr.generator, recipe.lr.score) == (1e-5, 3e-5)
    assert (recipe.mask.density, recipe.mask.source, recipe.mask.samples) == (0.2, "random", 2048)
    assert recipe.steps == 2


def test_a_partial_section_in_a_file_keeps_the_other_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-5\nmask:\n  density: 0.25\nweights: {forget: 0.01}\n")
    recipe = load_recipe(path, ["lr.score=2e-5"])
    assert (recipe.lr.generator, recipe.lr.score) == (1e-5, 2e-5)
    assert recipe.mask.density == 0.25
    assert recipe.mask.source == "saliency"
    assert recipe.weights.retain == 1.0


def test_sfd_is_one_key_away_and_says_so_when_a_mask_is_asked_for_beside_it():
    recipe = load_recipe("digits", ["method=sfd"])
    assert not recipe.uses_mask
    assert load_recipe("digits").uses_mask
    assert not load_recipe("digits", ["mask.source=none"]).uses_mask
    assert load_recipe("digits_sfd", ["mask.source=none"]).method == "sfd"
    message = refusal("digits", ["mask.density=0.1", "method=sfd"])
    assert message == "override mask.density: method sfd has no mask; use method=pecker, or leave mask.density out"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert recipe_to_yaml(load_recipe(path)) == recipe_to_yaml(recipe)
    assert shipped_recipes()[name].read_text().startswith("# ")


def test_the_hash_follows_every_key_but_the_place_of_the_run():
    base = load_recipe("digits")
    assert trajectory_sha256(base) == trajectory_sha256(load_recipe("digits", ["output=elsewhere", "resume=never"]))
    assert trajectory_sha256(base) == trajectory_sha256(recipe_from(recipe_to_dict(base)))
    for override in ("alpha=1.1", "mask.density=0.51", "lr=2e-4", "seed=1"):
        assert trajectory_sha256(base) != trajectory_sha256(load_recipe("digits", [override]))


def test_whole_numbers_serve_as_numbers_and_are_stored_as_such():
    recipe = load_recipe(None, ["alpha=1", "mask.density=1"])
    assert isinstance(recipe.alpha, float)
    assert trajectory_sha256(recipe) == trajectory_sha256(load_recipe(None, ["alpha=1.0", "mask.density=1.0"]))


def test_recipes_cannot_be_changed_after_the_fact():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(None).steps = 3


def test_every_key_has_a_type_a_default_and_one_line_of_help():
    rows = recipe_help()
    assert len(rows) == len({row[0] for row in rows}) > 50
    defaults = recipe_to_dict(Recipe())
    for key, kind, default, text in rows:
        assert text, key
        assert "\n" not in text, key
        assert "typing" not in kind, key
        assert "<" not in kind, key
        value = defaults
        for part in key.split("."):
            value = value[part]
        assert value == default, key
        assert not (isinstance(value, float) and math.isnan(value))


def test_mappings_from_python_raise_the_same_error():
    with pytest.raises(RecipeError, match=r"^unlearn: mask.densty: unknown key, did you mean mask.density\?$"):
        recipe_from({"mask": {"densty": 0.1}}, "unlearn")


def test_new_masks_are_not_compiled_anew_in_silence():
    with pytest.raises(RecipeError, match=r"mask.refresh.*mask.skip=false"):
        load_recipe("digits", ["engine.compile=blocks", "mask.refresh=10"])
    assert load_recipe("digits", ["engine.compile=blocks", "mask.refresh=10", "mask.skip=false"]).mask.refresh == 10
