"""What is forgotten in all its forms: a caption that names it never stays, one that comes near is told, others are kept."""

import pytest

from pecker_fast.conditions.notes import notes_of
from pecker_fast.conditions.prompts import plan_prompts
from pecker_fast.conditions.words import Names, put


def left(concept, caption):
    """Whether a caption is left out of `retain`."""
    plan = plan_prompts(
        {"concept": concept, "prompts": [f"a photo of {concept.split(',')[0]}"]}, "x1", [caption, "a boat"]
    )
    return caption not in plan.retain


@pytest.mark.parametrize(
    ("concept", "caption"),
    [
        ("church", "two churches in the snow"), ("Dogs", "a dog on a sofa"), ("dog", "an image of Dogs"),
        ("baby", "BABIES"), ("knife", "three knives"), ("mice", "a mouse"), ("woman", "women's hats"), ("bus", "buses"),
        ("buses", "a bus"), ("leaf", "leaves"), ("cactus", "cacti"), ("axis", "axes"), ("potato", "potatoes"),
        ("person", "people"), ("quiz", "quizzes"), ("tv", "two TVs"), ("Simpsons", "Homer Simpson"), ("fox", "foxes"),
        ("dog", "dog-like robot"), ("hatsune miku", "1girl, hatsune_miku, solo"), ("hatsune miku", "miku_hatsune"),
        ("hatsune miku", "HatsuneMiku"), ("hatsune miku", "hatsune-miku's hat"), ("spiderman", "spiderman"),
        ("spider-man", "spider man and spiderman"), ("girl", "1girl"), ("circle", "RedCircle"), ("cat", "ｃａｔ"),
        ("Zoë", "Zoe on stage"), ("Zoe", "ZOË"), ("Beyoncé", "beyonce\u0301"), ("Ångström", "angstrom"), ("Øyvind", "oyvind"),
        ("straße", "STRASSE"), ("o'brien", "O’Briens"), ("o'brien", "obrien"), ("Dr. No", "dr no"), ("AC/DC", "acdc"),
        ("ca\u200bt", "cat"), ("猫", "一只猫在沙发上"), ("cat", "一只cat在沙发上"), ("ネコ", "黒いネコ"), ("แมว", "ภาพแมวดำ"),
        ("고양이", "고양이가 잔다"), ("初音ミク", "初音 ミクの絵"), ("कुत्ता", "एक कुत्ता है"), ("кошка", "Кошка на диване"),
        ("nude", "nudity in art"), ("nude", "nudes"), ("nudity", "a nude woman"), ("violence", "a violent scene"),
        ("cubism", "cubist portrait"), ("cat, dog, church", "churches"), ("cat、dog", "a dog"), ("50 Cent", "50cent"),
        ("1984", "the year 1984"), ("C++", "a c++ book"), ("#MeToo", "a metoo march"),
    ],
)  # fmt: skip
def test_a_caption_that_names_it_in_any_form_is_left_out(concept, caption):
    assert left(concept, caption)


@pytest.mark.parametrize(
    ("concept", "caption"),
    [
        ("car", "a cart, a scarf and a carpet"), ("cat", "the catalog of categories"), ("art", "an artful party"),
        ("news", "a new car"), ("new", "the news"), ("bees", "to be"), ("toes", "go to bed"), ("glass", "a glassy lake"),
        ("man", "a human"), ("hen", "then when"), ("C++", "vitamin C"), ("donald", "a McDonald sign"), ("phone", "my iPhone"),
        ("बिल", "बिल्ली"), ("猫", "一只狗"), ("university", "the universe"), ("author", "an authority"), ("a b", "ab"),
        ("brad pitt", "brad is in the pit"), ("D", "a 3D movie"), ("мой", "кот"), ("dog house", "house, dog"),
    ],
)  # fmt: skip
def test_other_words_stay(concept, caption):
    assert not left(concept, caption)


@pytest.mark.parametrize(
    ("prompt", "concept", "cover", "expected"),
    [
        ("two churches in the snow", "church", "a house", "two houses in the snow"),
        ("a dog on a sofa", "dogs", "cats", "a cat on a sofa"),
        ("Babies!", "baby", "an old man", "Old men!"),
        ("three knives", "knife", "cup of tea", "three cups of tea"),
        ("nudes by Modigliani", "nude", "clothed", "clothed by Modigliani"),
        ("two dogs", "dog", "cats", "two cats"),
        ("hatsune_miku, solo", "hatsune miku", "girl", "girl, solo"),
        ("Zoe’s hat", "Zoë", "a singer", "A singer’s hat"),
        ("一只猫在沙发上", "猫", "犬", "一只犬在沙发上"),
        ("ｃａｔ and CATS", "cat", "dog", "dog and dogs"),
        ("women and men", "woman", "boy", "boys and men"),
    ],
)
def test_the_cover_takes_the_place_of_every_form(prompt, concept, cover, expected):
    assert put(prompt, [concept], [cover]) == expected


def test_a_name_is_found_where_it_stands_in_the_original():
    text = "Cafés, ｃａｔｓ and the Zoë-cats"
    assert [text[f.start : f.end] for f in Names(["cafe", "cat"]).all(text)] == ["Cafés", "ｃａｔｓ", "cats"]


def test_several_names_in_one_concept():
    forget = {"concept": "cat, dog, church", "prompts": ["a photo of a {}", "churches and a cat"]}
    plan = plan_prompts(forget, "cup, pen, house", ["a boat", "Dogs"])
    assert dict(zip(plan.forget, plan.cover)) == {
        "a photo of a cat": "a photo of a cup",
        "a photo of a dog": "a photo of a pen",
        "a photo of a church": "a photo of a house",
        "churches and a cat": "houses and a cup",
    }
    assert plan.concepts == (("cat", "cup"), ("dog", "pen"), ("church", "house"))
    assert set(plan_prompts(forget, "a thing, red", ["a boat"]).concepts) == {
        ("cat", "a thing, red"), ("dog", "a thing, red"), ("church", "a thing, red"),
    }  # fmt: skip


def test_what_comes_near_is_kept_and_told():
    captions = ["Pitt Street", "brat pit", "a boat", "Breed's bakery", "the catacomb"]
    plan = plan_prompts({"concept": "brad pitt", "prompts": ["{}"]}, "a man", captions)
    assert plan.retain == tuple(captions)
    assert plan.near == (("Pitt Street", "pitt"), ("brat pit", "brat pit"))
    (note,) = notes_of(plan)
    assert note.startswith(
        "retain: kept, although they come near what is forgotten: 2 captions, 'Pitt Street' (pitt), 'brat"
    )
    plan = plan_prompts({"concept": "church", "prompts": ["{}"]}, "house", [f"churchyard {i}" for i in range(9)])
    assert notes_of(plan)[0].count("churchyard") == 10  # five captions with their words
    assert "and 4 more" in notes_of(plan)[0]


def test_what_is_left_out_in_another_form_is_told():
    plan = plan_prompts({"concept": "dog", "prompts": ["{}"]}, "cat", ["DOG", "dogs", "a boat"])
    assert (plan.left_out, plan.other_forms) == (2, ("dogs",))
    assert notes_of(plan) == [
        "retain: left out, because they name what is forgotten in another form: 1 caption, 'dogs'"
    ]
    assert notes_of(plan_prompts({"concept": "dog", "prompts": ["{}"]}, "cat", ["dog", "a boat"])) == []


def test_plain_prompts_are_found_whole_and_their_own_words_told():
    captions = ["The photos of a Church, at night", "photos of churches", "a photo of a house", "猫的画像"]
    plan = plan_prompts(["a photo of a church", "猫"], ["a photo of a house", "犬"], captions)
    assert plan.retain == ("photos of churches", "a photo of a house")
    assert plan.near == (("photos of churches", "churches"),)
    assert plan.left_out == 2
