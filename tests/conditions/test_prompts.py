"""Prompts of a recipe: what each form gives, and that each mistake is one line naming key, place and remedy."""

import re

import pytest

from pecker_fast.conditions.prompts import plan_prompts
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import RECIPES, is_text
from pecker_fast.recipe.yaml import parse_yaml

KEEP = ["a boat on a lake", "a cat"]
PITT = {"concept": "brad pitt", "prompts": ["Brad Pitt on a horse"]}


def plan(forget, cover, retain=KEEP, **more):
    return plan_prompts(forget, cover, retain, **more)


def pairs(*arguments, **more):
    done = plan(*arguments, **more)
    assert len(done.forget) == len(done.cover)
    return list(zip(done.forget, done.cover))


def refusal(*arguments, **more):
    with pytest.raises(RecipeError) as caught:
        plan(*arguments, **more)
    message = str(caught.value)
    assert len(message) < 500
    return message


def covered(prompt, concept, cover):
    return plan({"concept": concept, "prompts": [prompt]}, cover).cover[0]


@pytest.mark.parametrize(
    ("prompt", "concept", "cover", "expected"),
    [
        ("a photo of Brad Pitt", "brad pitt", "a middle aged man", "a photo of a middle aged man"),
        ("Brad Pitt riding", "brad pitt", "a middle aged man", "A middle aged man riding"),
        ("brad pitt riding", "Brad Pitt", "a middle aged man", "a middle aged man riding"),
        ("BRAD PITT AT SEA", "brad pitt", "a middle aged man", "A MIDDLE AGED MAN AT SEA"),
        ("A big dog. Brad Pitt laughs", "brad pitt", "a man", "A big dog. A man laughs"),
        ('"Brad Pitt" on a poster', "brad pitt", "a man", '"A man" on a poster'),
        ("Brad  Pitt and\tbrad pitt", "brad pitt", "a man", "A man and a man"),
        ("Brad Pitt's hat", "brad pitt", "a middle aged man", "A middle aged man's hat"),
        ("the hat of Brad Pitt’s dog", "brad pitt", "two men in suits", "the hat of two men in suits’ dog"),
        ("Brad Pitt's hat", "brad pitt", "the boss", "The boss's hat"),
        ("James' hat", "james", "a man", "A man's hat"),
        ("a sign 'for James' there", "james", "a man", "a sign 'for a man' there"),
        ("a circle", "circle", "square", "a square"),
        ("a circle", "circle", "a square", "a square"),
        ("A circle on red", "circle", "a square", "A square on red"),
        ("an elephant", "elephant", "a square", "a square"),
        ("an elephant", "elephant", "square", "a square"),
        ("a circle", "circle", "oval", "an oval"),
        ("a horse", "horse", "unicorn", "a unicorn"),
        ("a clock", "clock", "hourglass", "an hourglass"),
        ("the circle", "circle", "a square", "the square"),
        ("in my circle", "circle", "the square", "in my square"),
        ("a red circle", "red", "orange", "an orange circle"),
        ("a circle-shaped pool", "circle", "square", "a square-shaped pool"),
        ("art at the party, artful art", "art", "craft", "craft at the party, artful craft"),
        ("a photo of the rock", "the rock", "a man", "a photo of a man"),
        ("a c++ book (C++)", "C++", "java", "a java book (java)"),
        ("a painting by O’Brien", "o'brien", "a man", "a painting by a man"),
        ("Beyonce\u0301 sings", "beyonc\u00e9", "a singer", "A singer sings"),
        ("{} and the sea", "brad pitt", "a man", "a man and the sea"),
        ("a {} and {}'s child", "elephant", "a dog", "a dog and a dog's child"),
    ],
)
def test_the_cover_takes_the_place_of_the_concept(prompt, concept, cover, expected):
    assert covered(prompt, concept, cover) == expected


def test_a_placeholder_becomes_the_concept_in_the_forget_prompt():
    assert pairs({"concept": "elephant", "prompts": ["a {} at {}'s home"]}, "a dog") == [
        ("an elephant at elephant's home", "a dog at a dog's home")
    ]


def test_captions_are_those_that_name_the_concept():
    captions = ["a red circle", "Two Circles", "a blue square", "CIRCLE, left", "a semicircle"]
    done = plan({"concept": "circle", "captions": captions}, "square", captions)
    assert done.forget == ("a red circle", "Two Circles", "CIRCLE, left")
    assert done.cover == ("a red square", "Two squares", "Square, left")
    assert done.retain == ("a blue square", "a semicircle")
    assert done.near == (("a semicircle", "semicircle"),)
    assert (done.left_out, done.concepts, done.unconditional) == (3, (("circle", "square"),), "")


def test_several_concepts_replace_each_other_nowhere():
    forget = [
        {"concept": "brad pitt", "prompts": ["brad pitt and pitt", "brad pitt with angelina"]},
        {"concept": "angelina", "prompts": ["angelina", "brad pitt with angelina"]},
        {"concept": "pitt", "captions": ["pitt", "brad pitt"]},
        {"concept": "brad", "captions": ["brad and brad pitt"]},
    ]
    done = plan(forget, ["a man", "a woman", "a boy", "a girl"])
    assert dict(zip(done.forget, done.cover)) == {
        "brad pitt and pitt": "a man and a boy",
        "brad pitt with angelina": "a man with a woman",
        "angelina": "a woman",
        "pitt": "a boy",
        "brad pitt": "a man",
        "brad and brad pitt": "a girl and a man",
    }
    assert done.concepts == (("brad pitt", "a man"), ("angelina", "a woman"), ("pitt", "a boy"), ("brad", "a girl"))
    assert plan(forget, "somebody").cover[1] == "somebody with somebody"


def test_plain_prompts_and_their_covers(tmp_path):
    assert pairs("a cat on a mat", "a dog") == [("a cat on a mat", "a dog")]
    assert pairs(["x", "y"], "z") == [("x", "z"), ("y", "z")]
    assert pairs(["x", "y"], ["z", "w"]) == [("x", "z"), ("y", "w")]
    (tmp_path / "forget").write_text("x\n\ny\n")
    (tmp_path / "cover.txt").write_text("# comment\nz\nw")
    assert pairs("forget", "cover.txt", folders=[tmp_path]) == [("x", "z"), ("y", "w")]


def test_keywords_stand_before_and_after_in_equal_parts():
    forget = {"keywords": ["k", "l", "m"], "prompts": ["Man", "Woman"]}
    assert pairs(forget, None) == [
        ("k Man", "Man"),
        ("Man l", "Man"),
        ("m Man", "Man"),
        ("Woman k", "Woman"),
        ("l Woman", "Woman"),
        ("Woman m", "Woman"),
    ]
    assert plan({**forget, "place": "before"}, None).forget[1] == "l Man"
    assert plan({**forget, "place": "after"}, None).forget[0] == "Man k"
    assert set(plan(forget, "a tree").cover) == {"a tree"}
    done = plan(forget, None, ["K here", "milk"], unconditional="keywords")
    assert (done.retain, done.left_out, done.unconditional, done.concepts) == (("milk",), 1, "k, l, m", ())


def test_keywords_and_concepts_in_one_run():
    forget = [{"keywords": ["k"], "prompts": ["Man"]}, {"concept": "circle", "prompts": ["a circle"]}]
    assert pairs(forget, [None, "square"]) == [("k Man", "Man"), ("a circle", "a square")]


def test_duplicates_are_merged_in_their_order():
    done = plan(["b's", "a", "b's ", "B’s"], ["x", "y", "x", "X"], ["k", "j", "k", "K", "a"])
    assert (done.forget, done.cover) == (("b's", "a"), ("x", "y"))
    assert (done.retain, done.left_out) == (("k", "j"), 1)


def test_files_are_found_as_given_then_in_the_folders_in_order(tmp_path, monkeypatch):
    here, first, second = (tmp_path / name for name in ("here", "first", "second"))
    for folder in (here, first, second):
        folder.mkdir()
        (folder / "p.txt").write_text(f"{folder.name}\n")
    (second / "q.txt").write_bytes(b"\xef\xbb\xbf  # comment\r\n\r\n  second  one\r\nother\rlast")
    monkeypatch.chdir(here)
    assert plan("p.txt", "x", folders=[first, second]).forget == ("here",)
    (here / "p.txt").unlink()
    assert plan("p.txt", "x", folders=[first, second]).forget == ("first",)
    assert plan("q.txt", "x", folders=[first, second]).forget == ("second one", "other", "last")
    assert plan(str(second / "p.txt"), "x").forget == ("second",)


def test_the_unconditional_text():
    assert plan("x", "y").unconditional == ""
    assert plan("x", "y", unconditional="").unconditional == ""
    assert plan("x", "y", unconditional=" ugly,  blurred ").unconditional == "ugly, blurred"


@pytest.mark.parametrize("value", ["a cat", ["a", "b"], {}, [{}], [0, "a"]])
def test_a_value_that_means_prompts(value):
    assert is_text(value)


@pytest.mark.parametrize("value", [0, [0, 1], [], None, True, 1.5])
def test_a_value_that_means_classes(value):
    assert not is_text(value)


LONG = "word " * 300
MISTAKES = [
    ({"concpt": "x", "prompts": ["x"]}, "y", KEEP, "forget.concpt: unknown key, did you mean forget.concept?"),
    ([PITT, {"prompt": 1}], "y", KEEP, "forget.1.prompt: unknown key, did you mean forget.1.prompts?"),
    ({"zzzz": 1}, "y", KEEP, "forget.zzzz: unknown key; a mapping holds concept with prompts, concept with captions"),
    ({"concept": "x"}, "y", KEEP, "forget: expected concept with prompts, .* got concept$"),
    ({**PITT, "captions": ["x"]}, "y", KEEP, "forget: expected .* got concept and prompts and captions"),
    ({**PITT, "place": "both"}, "y", KEEP, "forget: expected .* got concept and prompts and place"),
    ({"concept": "x", "keywords": ["k"], "prompts": ["p"]}, "y", KEEP, "forget: expected .* got concept and keywords"),
    ({}, "y", KEEP, "forget: expected .* got none of them"),
    ([PITT, "a prompt"], "y", KEEP, "forget.1: expected a mapping like the others of the list, got 'a prompt'"),
    ({**PITT, "concept": 3}, "y", KEEP, "forget.concept: expected the words that name the concept, got 3"),
    ({**PITT, "concept": " "}, "y", KEEP, "forget.concept: expected the words that name the concept, got ' '"),
    ({**PITT, "concept": "!?"}, "y", KEEP, "forget.concept: '!\\?' holds no word"),
    ({**PITT, "prompts": []}, "y", KEEP, "forget.prompts: the list is empty; give prompts"),
    ({**PITT, "prompts": 3}, "y", KEEP, "forget.prompts: expected a file with one of the prompts a line, or a list"),
    ({**PITT, "prompts": ["brad pitt", 3]}, "y", KEEP, "forget.prompts.1: expected text, got 3"),
    (
        {**PITT, "prompts": ["brad pitt", "brad putts horse"]},
        "y",
        KEEP,
        "forget.prompts.1: 'brad putts horse' does not name 'brad pitt'; write it, or {} in its place",
    ),
    ({**PITT, "prompts": ["a {}s hat"]}, "y", KEEP, "forget.prompts.0: {} must stand as a word of its own"),
    (
        {**PITT, "prompts": "no.txt"},
        "y",
        KEEP,
        "forget.prompts: no file 'no.txt' with prompts \\(looked in the current",
    ),
    ({**PITT, "prompts": ["no.txt"]}, "y", KEEP, "forget.prompts: the file 'no.txt' stands in a list"),
    ({**PITT, "prompts": [LONG]}, "y", KEEP, "forget.prompts.0: the text .* has 1499 characters \\(at most 1000\\)"),
    ({**PITT, "prompts": ["brad pitt \x1b"]}, "y", KEEP, "forget.prompts.0: holds the character '.x1b'"),
    ({**PITT, "prompts": ["brad pitt \ud800"]}, "y", KEEP, "forget.prompts.0: holds the character '.ud800'"),
    (
        {"concept": "circle", "captions": ["semicircles"]},
        "y",
        KEEP,
        "forget.captions: none of the 1 captions names 'circle'",
    ),
    (PITT, None, KEEP, "cover: expected the text that takes the place of what is forgotten, got nothing"),
    (PITT, 1, KEEP, "cover: expected the text that takes the place of what is forgotten, got 1"),
    (PITT, "", KEEP, "cover: expected the text that takes the place of what is forgotten, got ''"),
    (PITT, "a.txt", KEEP, "cover: expected the text that takes the concept's place, got the file 'a.txt'"),
    (PITT, ["a", "b"], KEEP, "cover: 2 texts for 1 concepts; give one, or one for each"),
    (PITT, "a BRAD PITT mask", KEEP, "cover: 'a BRAD PITT mask' itself names 'BRAD PITT', which is to be forgotten"),
    (
        [PITT, {"concept": "dog", "prompts": ["dog"]}],
        ["a dog", "a cat"],
        KEEP,
        "cover.0: 'a dog' itself names 'dog', which is to be forgotten",
    ),
    ([PITT, PITT], ["x", "y"], KEEP, "cover.1: 'brad pitt' already has the cover 'x'; give it one cover"),
    ({"concept": "a b", "prompts": ["a b b"]}, "x a", KEEP, "cover: 'x a b', the cover prompt of 'a b b', names 'a b'"),
    ({"keywords": ["k"], "prompts": ["p"]}, 1, KEEP, "cover: expected .* \\(null = the plain subject\\), got 1"),
    ({"keywords": ["k"], "prompts": ["p"], "place": "befor"}, None, KEEP, "forget.place: .* did you mean before\\?"),
    ({"keywords": ["k"], "prompts": ["p"], "place": []}, None, KEEP, "forget.place: expected one of both, before, aft"),
    ({"keywords": [], "prompts": ["p"]}, None, KEEP, "forget.keywords: the list is empty; give keywords"),
    (
        {"keywords": ["k"], "prompts": ["p", "some K"]},
        None,
        KEEP,
        "forget.prompts.1: the subject 'some K' already names the keyword 'K'; write it without",
    ),
    (
        {"keywords": list(map(str, range(400))), "prompts": [f"p{i}" for i in range(300)]},
        None,
        KEEP,
        "forget.keywords: 300 subjects with 400 keywords make 120000 prompts",
    ),
    ({"keywords": ["k"], "prompts": ["p"]}, "a k", KEEP, "cover: 'a k', the cover prompt of 'k p', names 'k' itself"),
    (None, "y", KEEP, "forget: expected a prompt, a prompt file, a list or a mapping, got nothing"),
    ([], "y", KEEP, "forget: the list is empty"),
    (["a", 3], "y", KEEP, "forget.1: expected text, got 3"),
    ("x.txt", "y", KEEP, "forget: no file 'x.txt' with prompts"),
    ("a" * 5000, "y", KEEP, "forget: the text .* has 5000 characters"),
    ("x", None, KEEP, "cover: expected a prompt to draw in place of what is forgotten, got nothing"),
    (["x", "y", "z"], ["a", "b"], KEEP, "cover: 2 prompts for 3 forget prompts; give one, or one for each"),
    ("A cat", "a  cat", KEEP, "forget: 'A cat' has itself as cover prompt"),
    (["x", "y"], ["y", "z"], KEEP, "cover: 'y', the cover prompt of 'x', is a forget prompt itself"),
    (["x", "X"], ["y", "z"], KEEP, "forget.1: 'X' stands here twice with different covers; take one out"),
    ("x", "y", None, "retain: a text-to-image model needs captions to keep; give a file with one caption a line"),
    ("x", "y", 3, "retain: expected a file with one of the captions a line, or a list, got 3"),
    ("x", "y", "a boat", "retain: no file 'a boat' with captions"),
    ("x", "y", ["X"], "retain: all 1 captions name what is to be forgotten; add others"),
    (PITT, "y", ["brad pitt", "Brad Pitt at sea"], "retain: all 2 captions name what is to be forgotten"),
]


@pytest.mark.parametrize(("forget", "cover", "retain", "expected"), MISTAKES)
def test_each_mistake_is_one_line(forget, cover, retain, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(forget, cover, retain)
    assert re.match(expected.replace("{}", "\\{\\}"), message), message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "guidance.unconditional: expected text, got 3"),
        ("keywords", "guidance.unconditional: keywords stands for forget.keywords, which the recipe does not have"),
        (LONG, "guidance.unconditional: the text 'word"),
    ],
)
def test_mistakes_in_the_unconditional_text(value, expected):
    assert refusal("x", "y", unconditional=value).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no prompts; write one a line"),
        (b"\n# only a comment\n  \n", "holds no prompts; write one a line"),
        (b"brad pitt\n\xff\xfe\n", "line 2: not UTF-8 text"),
        (b"brad pitt\0", "not text (it holds zero bytes)"),
        (b"# comment\n\nbrad pitt\r\na man\n", "line 4: 'a man' does not name 'brad pitt'"),
        (b"brad pitt\n" + b"brad pitt " * 200, "line 2: the text 'brad pitt"),
        (b"brad pitt\nbrad\x08 pitt", "line 2: holds the character '\\x08'"),
        (b"brad pitt\n" * 900_000, "is too long for a text file here"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(content, expected, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    message = refusal({"concept": "brad pitt", "prompts": "p.txt"}, "a man", folders=[tmp_path])
    assert message.startswith(f"forget.prompts: {file}")
    assert expected in message


def test_what_a_replacement_makes_too_long_is_refused():
    message = refusal({"concept": "x", "prompts": ["x " * 400]}, "four more letters")
    assert message.startswith("forget.prompts.0: the cover prompt 'four")


TEXT_RECIPES = ("sd15_celebrity", "sd15_nudity", "sd21_celebrity", "sdxl_celebrity")


@pytest.mark.parametrize("name", TEXT_RECIPES)
def test_shipped_recipes_have_the_prompts_and_settings_of_the_papers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_yaml((RECIPES / f"{name}.yaml").read_text(), name)
    guidance = recipe["guidance"]
    done = plan_prompts(
        recipe["forget"],
        recipe["cover"],
        recipe["retain"],
        folders=[RECIPES],
        unconditional=guidance["unconditional"],
    )
    assert is_text(recipe["forget"])
    assert len(done.retain) + done.left_out >= 200
    assert done.left_out == 0
    if name == "sd15_nudity":
        keywords = done.unconditional.split(", ")
        assert len(keywords) >= 3
        assert len(done.forget) == 12 * len(keywords)
        subjects = "Boy,Girl,Man,Woman,Couple,Person,people,Figure,Body,Human Form,Portrait,Silhouette"
        assert ",".join(dict.fromkeys(done.cover)) == subjects
        before = sum(prompt.startswith(tuple(keywords)) for prompt in done.forget)
        assert before == len(done.forget) / 2
    else:
        assert len(done.forget) == len(set(done.cover)) == 50
        assert all("Brad Pitt" in prompt for prompt in done.forget)
        assert all("a middle aged man" in prompt.lower() for prompt in done.cover)
        assert (done.concepts, done.unconditional) == ((("brad pitt", "a middle aged man"),), "")
    assert recipe["steps"] == round(100_000 / (4 * recipe["batch_size"]))
    assert recipe["lr"] == {"generator": 1e-6, "score": 3e-6}
    assert recipe["timesteps"] == {"init": 625, "min": 20, "max": 980}
    assert [guidance[key] for key in ("score_train", "score", "teacher", "text_dropout")] == [4.5, 4.5, 4.5, 0.1]
    assert (recipe["alpha"], recipe["ema"], recipe["batch_size"], recipe["precision"]) == (1.0, 0, 8, "bf16")
    assert not {"mask", "update_rule", "weights", "optimizer"} & set(recipe)  # the defaults are the paper's


def test_every_shipped_prompt_file_is_used():
    used = "".join((RECIPES / f"{name}.yaml").read_text() for name in TEXT_RECIPES)
    files = [path.name for path in (RECIPES / "prompts").iterdir()]
    assert files
    assert [name for name in files if f"prompts/{name}" not in used] == []
