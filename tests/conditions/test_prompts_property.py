"""Random prompts: a cover prompt never names what is forgotten, and nothing but a plan or a one-line refusal comes out."""

import re
from collections import Counter

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pecker_fast.conditions.prompts import PromptPlan, plan_prompts
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import is_text

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
WORDS = [
    "a",
    "an",
    "the",
    "art",
    "party",
    "circle",
    "Brad",
    "PITT",
    "pitt",
    "pitt's",
    "'pitt'",
    "{}",
    "İ",
    "ß",
    "o’b",
    ".",
]
words = st.sampled_from(WORDS)
texts = st.lists(words, max_size=6).map(" ".join)
names = st.sampled_from(["art", "circle", "brad pitt", "Pitt", "the art", "İ", "ß", "o'b", "a"])
neutral = st.sampled_from(["square", "a square", "an Oval", "the suits", "x"])

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), texts)
keys = st.one_of(st.sampled_from(["concept", "prompts", "captions", "keywords", "place"]), st.text(max_size=4))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)

lists = st.lists(texts.filter(str.strip), min_size=1, max_size=4)
mappings = st.one_of(
    st.fixed_dictionaries({"concept": names, "captions": lists}),
    st.fixed_dictionaries({"concept": names, "prompts": lists.map(lambda found: [f"{text} {{}}" for text in found])}),
    st.fixed_dictionaries({"keywords": lists, "prompts": lists}, optional={"place": st.sampled_from(["before", "x"])}),
)
forgets = st.one_of(values, texts, lists, mappings, st.lists(mappings, max_size=3))


def outcome(*arguments, **more):
    """The plan, or None after a well-formed refusal; any other exception fails the test."""
    try:
        plan = plan_prompts(*arguments, **more)
    except RecipeError as error:
        message = str(error)
        assert re.match(r"(forget|cover|retain|guidance\.unconditional)[:.]", message)
        assert len(message) < 800
        return None
    assert isinstance(plan, PromptPlan)
    assert len(plan.forget) == len(plan.cover) > 0
    assert plan.retain
    for kind in (plan.forget, plan.retain):
        assert max(Counter(text.casefold() for text in kind).values()) == 1
    assert not {text.casefold() for text in plan.forget} & {text.casefold() for text in (*plan.cover, *plan.retain)}
    return plan


def named(text, name):
    """Whether `name` stands in `text` as whole words; a second way to say it."""
    text, name = (part.casefold().replace("’", "'") for part in (text, name))
    return any(
        not (text[:at] and re.match(r"\w", text[at - 1]))
        and not re.match(r"\w", text[at + len(name) : at + len(name) + 1])
        for at in range(len(text))
        if text.startswith(name, at)
    )


@settings(max_examples=300, **QUICK)
@given(forgets, neutral | values, lists | values, st.none() | scalars)
def test_any_value_gives_a_plan_or_one_line(forget, cover, retain, unconditional):
    is_text(forget)
    outcome(forget, cover, retain, unconditional=unconditional)


@settings(max_examples=300, **QUICK)
@given(st.lists(names, min_size=1, max_size=3), neutral, st.lists(texts, min_size=1, max_size=6))
def test_covers_and_captions_to_keep_never_name_a_concept(concepts, cover, captions):
    assume(not any(named(cover, name) for name in concepts))
    captions = [*filter(str.strip, captions), *concepts]
    plan = outcome([{"concept": name, "captions": captions} for name in concepts], cover, [*captions, "boat"])
    if plan is None:
        return
    for name, _ in plan.concepts:
        assert not any(named(text, name) for text in (*plan.cover, *plan.retain))
    bare = [re.sub(r"[ '’.]+", " ", text) for text in plan.forget]  # Brad 'pitt' names brad pitt
    assert all(any(named(text, name.replace("'", " ")) for name in concepts) for text in bare)
    kept = {text.casefold() for text in (*plan.forget, *plan.retain)}
    assert all(" ".join(text.split()).casefold() in kept for text in captions)


@settings(max_examples=200, **QUICK)
@given(texts.filter(lambda text: "{}" not in text), neutral, texts)
def test_what_surrounds_the_concept_stays(before, cover, after):
    assume(not any(word in f"{before} {after}".lower() for word in ("pitt", "'")))
    assume("{}" not in after)
    plan = outcome({"concept": "pitt", "prompts": [f"{before} pitt {after}"]}, cover, ["boat"])
    assert plan is not None
    (got,) = plan.cover
    kept = before.split()
    if kept and kept[-1] in ("a", "an", "the"):
        kept.pop()
    assert got.split()[: len(kept)] == kept
    rest = after.split()
    assert not rest or got.split()[-len(rest) :] == rest
    assert cover.split()[-1] in got.split()


@settings(max_examples=200, **QUICK)
@given(st.integers(1, 9), st.integers(1, 9))
def test_half_of_the_keywords_stand_before(subjects, keywords):
    plan = outcome(
        {"keywords": [f"k{i}" for i in range(keywords)], "prompts": [f"s{i}" for i in range(subjects)]}, None, ["boat"]
    )
    assert len(plan.forget) == subjects * keywords
    assert all(set(text.split()) == {*text.split(), cover} for text, cover in zip(plan.forget, plan.cover))
    before = sum(text.startswith("k") for text in plan.forget)
    assert abs(2 * before - len(plan.forget)) <= 1
