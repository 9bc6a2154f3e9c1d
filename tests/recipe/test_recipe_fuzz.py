"""Random recipes: never anything but a Recipe or a one-line RecipeError, and typos get the right suggestion."""

import random
import string

import pytest
import yaml
from hypothesis import strategies as st
from some import counts, generated

from pecker_fast.errors import RecipeError
from pecker_fast.recipe import Recipe, load_recipe, recipe_from, recipe_help, recipe_to_dict, recipe_to_yaml

KEYS = [key for key, *_ in recipe_help()]
WORDS = sorted({part for key in KEYS for part in key.split(".")})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["saliency", "none", "auto", "sfd", "", "1e-4", "nan", "\n", "*a", "!!x", "{", "\0", "\ud7ff"]),
)
names = st.one_of(st.sampled_from(WORDS), st.sampled_from(KEYS), st.text(max_size=8), st.integers(), st.none())
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=5)),
    max_leaves=12,
)


def outcome(call, *arguments):
    """The recipe, or None after a well-formed refusal; any other exception fails the test."""
    try:
        recipe = call(*arguments)
    except RecipeError as error:
        message = str(error)
        assert message
        assert len(message) < 1500
        assert message.isprintable(), repr(message)
        return None
    assert isinstance(recipe, Recipe)
    return recipe


@counts(400)
def test_random_trees(count):
    def of(tree):
        recipe = outcome(recipe_from, tree)
        if recipe is not None:
            assert recipe_from(yaml.safe_load(recipe_to_yaml(recipe))) == recipe

    generated(count, of, tree=st.dictionaries(names, trees, max_size=6))


@counts(200)
def test_a_random_value_for_a_real_key(count):
    def of(key, value):
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        outcome(recipe_from, tree)

    generated(count, of, key=st.sampled_from(KEYS), value=trees)


@counts(300)
def test_random_overrides(count):
    def of(overrides):
        outcome(load_recipe, None, overrides)

    override = st.one_of(st.text(max_size=30), st.builds("{}={}".format, names, st.text(max_size=20)))
    generated(count, of, overrides=st.lists(override, max_size=3))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


@counts(200)
def test_random_files(scratch, count):
    def of(content):
        scratch.write_bytes(content)
        outcome(load_recipe, scratch)

    text = st.text(max_size=80).map(lambda text: text.encode(errors="replace"))
    generated(count, of, content=st.one_of(st.binary(max_size=80), text))


@counts(150)
def test_damaged_real_recipes(scratch, count):
    draw = random.Random(0)
    good = recipe_to_yaml(Recipe()).encode()
    for _ in range(count):
        content = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(content))
            content[at : at + draw.randint(0, 2)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 2)))
        scratch.write_bytes(bytes(content))
        outcome(load_recipe, scratch)


def one_letter_typos(word: str, draw: random.Random) -> str:
    """`word` with one letter dropped, added, replaced, or swapped with its neighbour."""
    at = draw.randrange(len(word))
    letter = draw.choice(string.ascii_lowercase + "_")
    swap = word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :]
    return draw.choice(
        [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :], swap]
    )


@counts(1000)
def test_one_letter_typos_get_the_right_suggestion(count):
    draw = random.Random(1)
    right = total = 0
    wrong = []
    while total < count:
        key = draw.choice(KEYS)
        parts = key.split(".")
        at = draw.randrange(len(parts))  # sections are misspelt too
        parts[at] = one_letter_typos(parts[at], draw)
        typo = ".".join(parts)
        if typo in KEYS or not all(parts):
            continue
        total += 1
        with pytest.raises(RecipeError) as caught:
            load_recipe(None, [f"{typo}=1"])
        right += f"did you mean {key}?" in str(caught.value)
        if f"did you mean {key}?" not in str(caught.value):
            wrong.append((key, str(caught.value)))
    assert right / total >= 0.95, wrong


def test_wrong_types_name_their_key():
    wrong = {int: ["x", 1.5, True, [], {}], float: ["x", True, [], {}], bool: ["x", 1, []], str: [1, True, [], {}]}
    cases = 0
    for key, kind, default, _ in recipe_help():
        if type(default) not in wrong or "list" in kind:
            continue
        for value in wrong[type(default)]:
            tree = recipe_to_dict(Recipe())
            *parents, last = key.split(".")
            inside = tree
            for part in parents:
                inside = inside[part]
            inside[last] = value
            with pytest.raises(RecipeError, match=rf"^recipe: {key}: expected .*, got "):
                recipe_from(tree)
            cases += 1
    assert cases > 150
