"""The protocols on samplers and detectors whose every figure is known in advance."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pecker_fast.errors import ModelError, PeckerError, RecipeError
from pecker_fast.evaluate import concepts
from pecker_fast.evaluate.concepts import celebrity, i2p, protocol_table, word_figures
from pecker_fast.evaluate.detector import Detector
from pecker_fast.evaluate.drawing import Prompt, dealt, numbered
from pecker_fast.evaluate.intervals import Share, wilson

ROOT = Path(__file__).parents[2]


def painted(*colours):
    """A sampler whose image of prompt i is filled with colours[i], three numbers; the last pixel is noise."""

    def sample(indices, seed):
        images = torch.tensor(colours)[indices].view(-1, 3, 1, 1).repeat(1, 1, 2, 2)
        images[:, :, 1, 1] = torch.randn(len(indices), 3, generator=torch.Generator().manual_seed(seed)) / 9
        return images

    return sample


def pixel(channel):
    return lambda images: images[:, channel, 0, 0]


def reader(faces=True, flag=True, score=0):
    """A detector that reads score, faces / 10 and flag from the three channels."""
    answer = {"score": pixel(score)}
    if faces:
        answer["faces"] = lambda images: (10 * pixel(1)(images)).round()
    if flag:
        answer["flag"] = lambda images: pixel(2)(images) > 0.5
    return Detector("reader", lambda images: {key: value(images) for key, value in answer.items()})


FOUR = painted((0.75, 0.1, 1.0), (0.25, 0.1, 0.0), (1.0, 0.0, 1.0), (0.5, 0.2, 1.0))  # the third has no face
PROMPTS = numbered(["a", "b", "c", "d"])


def test_wilson_against_published_values():
    """Newcombe 1998, table I, the score method without continuity correction."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) is None


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case):
    hits, n = case
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    assert (low == 0) == (hits == 0)
    other = wilson(n - hits, n)
    assert (1 - high, 1 - low) == pytest.approx(other, abs=1e-12)
    if n > 1 and 0 < hits < n:
        assert high - low < 2 * 1.96 / (4 * n) ** 0.5


def test_words_of_one_image_do_not_narrow_its_interval():
    assert Share(90, 120, images=40).value == 0.75
    assert Share(90, 120, images=40).interval == list(wilson(30, 40))


def test_celebrity():
    result = celebrity(FOUR, PROMPTS, reader(), seeds=20)
    assert result["score"] == 0.5  # (0.75 + 0.25 + 0.5) / 3: the faceless image's 1.0 is never read
    assert (result["images"], result["prompts"], result["with_face"]) == (80, 4, 60)
    assert (result["no_face"], result["named"], result["named_with_face"]) == (0.25, 0.5, pytest.approx(2 / 3))
    assert result["intervals"]["no_face"] == list(wilson(20, 80))
    assert result["intervals"]["named"] == list(wilson(40, 80))
    assert result["intervals"]["named_with_face"] == list(wilson(40, 60))
    assert json.loads(json.dumps(result)) == result


def test_celebrity_mean_is_of_the_images_with_a_face():
    """Over all images the score of a model that mostly draws no people would fall with no one forgotten."""
    mostly_empty = painted((0.875, 0.1, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    result = celebrity(mostly_empty, PROMPTS, reader(), seeds=5)
    assert result["score"] == 0.875
    assert (result["no_face"], result["named"], result["named_with_face"]) == (0.75, 0.25, 1.0)


def test_celebrity_without_a_single_face():
    result = celebrity(painted((0.9, 0.0, 1.0)), PROMPTS[:1], reader(), seeds=3)
    assert (result["score"], result["named"], result["no_face"]) == (None, 0.0, 1.0)
    assert result["named_with_face"] is None
    assert result["intervals"]["named_with_face"] is None
    assert ("Detector score ↓", "–", "–") in [row[:3] for row in protocol_table(result)]


def test_celebrity_needs_faces():
    with pytest.raises(ModelError, match="detector reader: returns no faces"):
        celebrity(FOUR, PROMPTS, reader(faces=False))


def test_i2p():
    result = i2p(FOUR, PROMPTS, [reader()], images=10)
    assert (result["sample_probability"], result["worst_of_prompt"]) == (0.75, 0.75)
    assert result["expected_max_score"] == (0.75 + 0.25 + 1.0 + 0.5) / 4
    assert (result["images"], result["prompts"], result["per_category"]) == (40, 4, {})
    assert result["intervals"]["sample_probability"] == list(wilson(30, 40))
    assert result["intervals"]["worst_of_prompt"] == list(wilson(3, 4))
    assert json.loads(json.dumps(result)) == result


def test_i2p_one_bad_image_makes_the_worst_of_its_prompt():
    calls = iter(range(10**6))

    def score(images):
        return {"score": [0.9 if next(calls) in (3, 25, 26) else 0.1 for _ in images]}

    result = i2p(FOUR, PROMPTS, [Detector("rare", score)], images=10, batch_size=7)
    assert result["sample_probability"] == 3 / 40
    assert result["worst_of_prompt"] == 2 / 4  # images 3 of prompt 0, 5 and 6 of prompt 2
    assert result["expected_max_score"] == pytest.approx((0.9 + 0.1 + 0.9 + 0.1) / 4)


def test_i2p_any_of_several_detectors():
    first = Detector("first", lambda x: {"score": (pixel(0)(x) == 0.25).float()})
    second = Detector("second", lambda x: {"score": (pixel(0)(x) == 0.5) * 0.75})
    assert i2p(FOUR, PROMPTS, [first])["sample_probability"] == 0.25
    assert i2p(FOUR, PROMPTS, [second])["sample_probability"] == 0.25
    both = i2p(FOUR, PROMPTS, [first, second])
    assert (both["sample_probability"], both["expected_max_score"]) == (0.5, (1 + 0.75) / 4)
    assert both["detectors"] == ["first", "second"]


def test_i2p_by_category():
    categories = [("hate",), ("hate", "violence"), (), ("violence",)]
    result = i2p(FOUR, PROMPTS, [reader()], images=4, categories=categories)
    assert result["per_category"] == {"hate": 0.5, "violence": 0.5}
    assert result["intervals"]["per_category"]["hate"] == list(wilson(4, 8))
    rows = dict(row[:2] for row in protocol_table(result))
    assert rows["Sample probability: hate ↓"] == "50.00 %"


def test_i2p_with_the_seeds_of_the_file():
    asked = []

    def sample(indices, seed):
        asked.append((indices.tolist(), seed))
        return FOUR(indices, seed)

    result = i2p(sample, PROMPTS, [reader()], images=3, seeds=[5, 2**40, 0, 5])
    assert asked == [([0] * 3, 5), ([1] * 3, 2**40), ([2] * 3, 0), ([3] * 3, 5)]
    assert result["sample_probability"] == 0.75


@pytest.mark.parametrize("protocol", ["celebrity", "i2p"])
def test_no_figure_depends_on_the_batch_size(protocol):
    def noisy(images):  # scores that differ from image to image
        score = ((images[:, 0, 1, 1] + 1) / 2).clamp(0, 1)
        return {"score": score, "faces": (score > 0.45).int(), "flag": score > 0.5}

    def run(batch_size):
        detector = Detector("noisy", noisy)
        if protocol == "celebrity":
            return celebrity(FOUR, PROMPTS, detector, seeds=80, batch_size=batch_size)
        return i2p(FOUR, PROMPTS, [detector], images=80, batch_size=batch_size)

    whole = run(1000)
    assert 0 < whole["intervals"]["named" if protocol == "celebrity" else "sample_probability"][0] < 0.9
    for size in (3, 64, 250):
        assert run(size) == whole


JUDGE_WORDS = {"shape": ("circle", "square", "star"), "colour": ("red", "green", "blue")}


class Words:
    """A judge that reads the place of each attribute's word from its channel."""

    attributes = JUDGE_WORDS

    def expected(self, prompt):
        return {a: w for a, words in JUDGE_WORDS.items() for w in words if w in prompt.split()}

    def seen(self, images):
        places = (images[:, :, 0, 0] * 10).round().long().tolist()
        return {a: [words[place[i]] for place in places] for i, (a, words) in enumerate(JUDGE_WORDS.items())}


def drawing(prompts, becomes=lambda words, i: words):
    """A sampler that draws the words of its prompts; `becomes(words, number of the image in its group)` may swap them."""
    texts, count = {p.row: p.text for p in prompts}, {}

    def sample(indices, seed):
        images = torch.rand(len(indices), 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        for image, index in zip(images, indices.tolist()):
            group = "forget" if index in {p.row for p in FORGET} else "retain"
            i = count[group] = count.get(group, -1) + 1
            words = becomes(dict.fromkeys(JUDGE_WORDS) | Words().expected(texts[index]), i)
            for channel, attribute in enumerate(JUDGE_WORDS):
                known = JUDGE_WORDS[attribute]
                image[channel, 0, 0] = (known.index(words[attribute]) if words[attribute] else 0) / 10
        return images

    return sample


FORGET = [Prompt(4, "a red circle"), Prompt(2, "a green circle")]
COVER = ["a red square", "a green square"]
RETAIN = [Prompt(7, "a blue star"), Prompt(0, "a red square"), Prompt(1, "something green")]


def words(becomes=lambda words, i: words, **changes):
    given_ = {"forget": FORGET, "cover": COVER, "retain": RETAIN, "samples": 40, "seed": 0} | changes
    sampler = given_.pop("sampler", None) or drawing([*given_["forget"], *given_["retain"]], becomes)
    return word_figures(sampler, given_.pop("judge", Words()), **given_)


def swap(old, new, until=10**9):
    def becomes(words, i):
        return {a: new if w == old and i < until else w for a, w in words.items()}

    return becomes


def test_words_of_an_untouched_model():
    result = words()
    assert (result["ua"], result["cover_rate"]) == (0.0, 0.0)
    assert (result["obeyed"], result["obeyed_all"]) == ({"colour": 1.0}, 1.0)
    assert (result["retain_accuracy"], result["retain_obeyed"]) == (1.0, {"colour": 1.0, "shape": 1.0})
    assert (result["ira"], result["cra"]) == (1.0, 1.0)
    assert result["per_class"] == dict.fromkeys(["blue", "circle", "green", "red", "square", "star"], 1.0)
    assert (result["samples"], result["unjudged"]) == (40, {"forget": 0, "retain": 0})
    assert json.loads(json.dumps(result)) == result


def test_words_of_an_unlearned_model():
    result = words(swap("circle", "square"))
    assert (result["ua"], result["cover_rate"], result["retain_accuracy"]) == (1.0, 1.0, 1.0)
    assert (result["per_class"]["circle"], result["per_class"]["square"]) == (0.0, 1.0)
    assert result["intervals"]["ua"] == list(wilson(40, 40))


def test_words_forgotten_but_not_covered():
    result = words(swap("circle", "star"))
    assert (result["ua"], result["cover_rate"], result["obeyed_all"]) == (1.0, 0.0, 1.0)


def test_words_ua_is_over_the_forget_samples_alone():
    """A tenth still drawn: over the folder of all images, as upstream counts, 90 % would become 95 %."""
    result = words(swap("circle", "square", until=36))
    assert (result["ua"], result["cover_rate"], result["per_class"]["circle"]) == (0.9, 0.9, 0.1)
    assert result["intervals"]["ua"] == list(wilson(36, 40))


def test_words_other_words_of_the_forget_prompts():
    result = words(lambda w, i: swap("red", "blue")(swap("circle", "square")(w, i), i), retain=RETAIN[:1])
    assert (result["obeyed"], result["obeyed_all"]) == ({"colour": 0.5}, 0.5)  # half of the forget prompts say red
    assert result["ua"] == 1.0
    assert "red" not in result["per_class"]  # no retain prompt asks for it


def test_words_in_domain_and_cross_domain():
    """A third of the retain prompts each; "something green" has no shape to be judged by."""
    result = words(swap("star", "circle"), samples=30)
    assert result["retain_obeyed"] == {"colour": 1.0, "shape": 0.5}
    assert (result["ira"], result["cra"], result["retain_accuracy"]) == (0.5, 1.0, pytest.approx(2 / 3))
    assert result["per_class"]["star"] == 0.0
    assert result["intervals"]["ira"] == list(wilson(10, 20))
    result = words(swap("green", "red"), samples=30)
    assert (result["ira"], result["cra"]) == (1.0, pytest.approx(2 / 3))
    assert result["per_class"]["green"] == 0.0


def test_words_two_lost_in_one_prompt():
    """A red circle becomes a blue square: either word still seen is not forgotten, both must come in their place."""
    case = {"forget": FORGET[:1], "cover": ["a blue square"], "retain": RETAIN[2:]}
    assert words(swap("circle", "square"), **case)["ua"] == 0.0
    done = words(lambda w, i: swap("red", "blue")(swap("circle", "square")(w, i), i), **case)
    assert (done["ua"], done["cover_rate"], done["obeyed"], done["obeyed_all"]) == (1.0, 1.0, {}, None)
    half = words(lambda w, i: swap("red", "green")(swap("circle", "square")(w, i), i), **case)
    assert (half["ua"], half["cover_rate"]) == (1.0, 0.0)
    assert done["cra"] is None  # shape and colour both lose a word
    assert done["intervals"]["cra"] is None


def test_words_a_cover_without_a_word_of_that_attribute():
    result = words(swap("circle", "star"), cover=["red", "green"])
    assert (result["ua"], result["cover_rate"]) == (1.0, None)


def test_words_prompts_without_a_word_are_not_drawn():
    result = words(
        retain=[*RETAIN, Prompt(9, "nothing")], forget=[*FORGET, Prompt(3, "a star")], cover=[*COVER, "star"]
    )
    assert result["unjudged"] == {"forget": 1, "retain": 1}
    assert (result["ua"], result["retain_accuracy"]) == (0.0, 1.0)


def test_words_over_many_blocks():
    """600 images are 3 blocks: a prompt judged by another's image would show."""
    many = [Prompt(i, f"a {colour} {shape}") for i, (colour, shape) in enumerate(
        (colour, shape) for colour in JUDGE_WORDS["colour"] for shape in ("square", "star")) if i not in (4, 2)]  # fmt: skip
    result = words(swap("circle", "square", until=450), retain=many, samples=600)
    assert (result["ua"], result["cover_rate"], result["retain_accuracy"]) == (0.75, 0.75, 1.0)


def test_fewer_samples_than_prompts_are_no_mere_beginning():
    order = dealt(1000, 100, 0, "retain")
    assert len(set(order.tolist())) == 100
    assert 300 < order.double().mean() < 700
    assert torch.equal(order, dealt(1000, 100, 0, "retain"))
    assert not torch.equal(order, dealt(1000, 100, 1, "retain"))
    assert dealt(3, 300, 0, "forget").bincount().tolist() == [100] * 3


PROTOCOLS = {
    "celebrity": lambda sampler, **k: celebrity(sampler, PROMPTS, reader(), seeds=80, **k),
    "i2p": lambda sampler, **k: i2p(sampler, PROMPTS, [reader()], images=80, **k),
    "classes": lambda sampler, **k: words(sampler=sampler, samples=320, **k),
}


def recorded(protocol, sampler, **changes):
    """(indices, seed) of every call, and the noise that was drawn."""
    calls = []

    def sample(indices, seed):
        images = sampler(indices, seed)
        calls.append((tuple(indices.tolist()), seed, images[:, :, 1, 1].clone()))
        return images

    PROTOCOLS[protocol](sample, **changes)
    return calls


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_models_see_equal_noise(protocol):
    def other(indices, seed):  # draws other things from the same noise
        images = FOUR(indices.clamp(max=3), seed)
        images[:, :, 0, 0] = 0.2
        return images

    first = recorded(protocol, lambda indices, seed: FOUR(indices.clamp(max=3), seed) * 0.2)
    second = recorded(protocol, other)
    assert [call[:2] for call in first] == [call[:2] for call in second]
    for one, two in zip(first, second):
        torch.testing.assert_close(one[2], two[2] * 0.2)
    assert len({call[1] for call in first}) == len(first) > 1  # every block has noise of its own
    assert {call[1] for call in recorded(protocol, other, seed=1)}.isdisjoint(call[1] for call in first)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda i, s: torch.full((len(i), 3, 2, 2), float("nan")), "not finite: the generator has diverged"),
        (lambda i, s: torch.zeros(len(i) - 1, 3, 2, 2), r"asked for 250 images and returned \(249, 3, 2, 2\)"),
        (lambda i, s: torch.zeros(len(i), 12), r"returned \(250, 12\)"),
    ],
)
def test_a_sampler_that_fails(protocol, broken, message):
    with pytest.raises(PeckerError, match=message):
        PROTOCOLS[protocol](broken)


class Blind(Words):
    def seen(self, images):
        return {"shape": Words.seen(self, images)["shape"]}


class Slow(Words):
    def seen(self, images):
        return {**Words.seen(self, images), "colour": ["red"]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: celebrity(FOUR, [], reader()), "celebrity: needs prompts"),
        (lambda: celebrity(FOUR, PROMPTS, reader(), seeds=0), "0 images of each"),
        (lambda: i2p(FOUR, [], [reader()]), "i2p: needs prompts"),
        (lambda: i2p(FOUR, PROMPTS, [reader()], images=0), "0 images of each"),
        (lambda: i2p(FOUR, PROMPTS, []), "at least one --detector"),
        (lambda: i2p(FOUR, PROMPTS, [reader()], seeds=[1]), "1 seeds for 4 prompts"),
        (lambda: i2p(FOUR, PROMPTS, [reader()], categories=[()] * 5), "5 categories for 4 prompts"),
        (lambda: words(samples=0), "samples ≥ 1, got 0"),
        (lambda: words(cover=COVER[:1]), "one prompt for each of the 2 forget prompts, got 1"),
        (lambda: words(cover=[p.text for p in FORGET]), "no word that a forget prompt names and its cover"),
        (lambda: words(forget=[], cover=[]), "no word that a forget prompt names"),
        (lambda: words(retain=[]), "no word that a retain prompt names"),
        (lambda: words(retain=[Prompt(0, "nothing")]), "no word that a retain prompt names"),
    ],
)
def test_nothing_to_judge(call, message):
    with pytest.raises(RecipeError, match=message):
        call()


@pytest.mark.parametrize(("judge", "message"), [(Blind(), "colour of none"), (Slow(), "colour of 1$")])
def test_a_judge_that_does_not_see_it_all(judge, message):
    with pytest.raises(ModelError, match=message):
        words(judge=judge)


def test_the_table_has_every_figure():
    found = {
        "celebrity": celebrity(FOUR, PROMPTS, reader()),
        "i2p": i2p(FOUR, PROMPTS, [reader()], categories=[("hate",)] * 4),
        "classes": words(swap("circle", "square", until=36)),
    }
    assert tuple(found) == concepts.PROTOCOLS[:3]  # the others are in test_clip and test_canvas
    for result in found.values():
        table = protocol_table(result)
        assert {len(row) for row in table} == {len(concepts.TABLE_HEADER)}
        assert all(isinstance(cell, str) and cell for row in table for cell in row)
        parts = sum(len(v) if isinstance(v, dict) else 1 for k, v in result["intervals"].items())
        assert len([row for row in table if row[2] != "–"]) == parts
    rows = {row[0]: row[1:3] for row in protocol_table(found["classes"])}
    assert rows["Unlearning accuracy ↑"] == ("90.00 %", "76.95 … 96.04 %")
    assert rows["Other words: colour ↑"][0] == "100.00 %"


def test_the_examples_of_the_documentation_run():
    text = (ROOT / "docs" / "concepts.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    namespace = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/concepts.md, block {i + 1}", "exec"), namespace)
