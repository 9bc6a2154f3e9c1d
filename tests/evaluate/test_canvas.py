"""UnlearnCanvas' protocol with a judge that reads what it is asked off the images, so that every figure can be counted by hand."""

import pytest
import torch

from pecker_fast.errors import RecipeError
from pecker_fast.evaluate.canvas import SEEDS, canvas_prompts, unlearncanvas
from pecker_fast.evaluate.concepts import protocol_table
from pecker_fast.evaluate.judge import Judge
from pecker_fast.evaluate.words import WordJudge

WORDS = {"style": ("Van_Gogh", "Crayon", "Pop_Art"), "object": ("Dogs", "Sea")}
PROMPTS = [
    f"A {thing} image in {style.replace('_', ' ')} style." for style in WORDS["style"] for thing in WORDS["object"]
]

ROWS = {prompt: row for row, prompt in enumerate(PROMPTS)}


def judge(words=WORDS):
    plain = {name: tuple(word.replace("_", " ") for word in group) for name, group in words.items()}
    return WordJudge(Judge(lambda x: (x.flatten(1)[:, :2], x[:, 0, 0, :5]), 5), plain)


def sampler(told):
    """Images that show what `told` says of (style, object, seed); it also counts the calls."""
    calls = []

    def draw(rows, seed):
        images = torch.zeros(len(rows), 1, 5, 5)
        for image, row in zip(images, rows.tolist()):
            style, thing = told(*divmod(row, 2), seed)
            image[0, 0, style], image[0, 0, 3 + thing] = 1, 1
            calls.append((row, seed))
        return images

    return draw, calls


def test_every_style_with_every_object():
    forget, retain = canvas_prompts(WORDS, ["van gogh"])
    assert forget == PROMPTS[:2]
    assert retain == PROMPTS[2:]
    assert canvas_prompts(WORDS, ["Sea"])[0] == PROMPTS[1::2]


def test_figures_are_the_benchmarks():
    # Van Gogh is drawn as Crayon but with one seed; Pop Art loses its style with two seeds, its object with one
    def told(style, thing, seed):
        if style == 0 and seed != 588:
            return 1, thing
        if style == 2 and seed in (188, 288):
            return 1, thing
        if style == 2 and seed == 888:
            return 2, 1 - thing
        return style, thing

    draw, calls = sampler(told)
    found = unlearncanvas(draw, judge(), ["Van Gogh"], ROWS)
    assert sorted(calls) == [(row, seed) for row in range(6) for seed in SEEDS]
    assert found["ua"] == 8 / 10
    assert found["ira"] == (10 + 6) / 20  # styles of Crayon and Pop Art
    assert found["cra"] == (10 + 8) / 20  # their objects
    assert found["samples"] == 10
    assert found["seeds"] == list(SEEDS)
    assert [row[0] for row in protocol_table(found)][:3] == [
        "Unlearning accuracy ↑", "In-domain retain accuracy ↑", "Cross-domain retain accuracy ↑"
    ]  # fmt: skip
    draw, calls = sampler(told)
    assert unlearncanvas(draw, judge(), ["Van Gogh"], ROWS, 2)["ira"] == (4 + 0) / 8
    assert {seed for _, seed in calls} == {188, 288}


@pytest.mark.parametrize(
    ("words", "concepts", "seeds", "says"),
    [
        (
            {"shape": ("a", "b", "c"), "object": ("d", "e")},
            ["a"],
            5,
            "needs a judge of the attributes style and object",
        ),
        (WORDS, ["Monet"], 5, "the judge has no word for 'Monet'; its styles and objects are"),
        (WORDS, ["Sea"], 6, "seeds: unlearncanvas has 5 seeds"),
        (WORDS, ["Sea"], 0, "seeds: unlearncanvas has 5 seeds"),
    ],
)
def test_what_does_not_fit_is_one_line(words, concepts, seeds, says):
    with pytest.raises(RecipeError, match=says) as caught:
        unlearncanvas(sampler(lambda *_: (0, 0))[0], judge(words), concepts, ROWS, seeds)
    assert "\n" not in str(caught.value)
