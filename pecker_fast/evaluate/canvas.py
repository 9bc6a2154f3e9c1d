"""UnlearnCanvas' protocol (arXiv 2402.11846): every object in every style, five seeds, judged by a classifier of each.

https://github.com/OPTML-Group/UnlearnCanvas
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pecker_fast.conditions import clean
from pecker_fast.errors import RecipeError
from pecker_fast.evaluate.classes import Sampler
from pecker_fast.evaluate.drawing import Prompt
from pecker_fast.evaluate.obedience import WordJudge, word_figures

ATTRIBUTES = ("style", "object")
SEEDS = (188, 288, 588, 688, 888)  # an image of each prompt with each


def prompt_of(style: str, thing: str) -> str:
    """The benchmark's prompt of a style and an object, by their words; underscores of the data set's names are spaces."""
    return f"A {thing.replace('_', ' ')} image in {style.replace('_', ' ')} style."


def canvas_prompts(attributes: Mapping[str, Sequence[str]], concepts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(prompts with a concept in them, all others), of every style with every object.

    attributes: of the judge. Raises RecipeError unless these are `ATTRIBUTES`, and for a concept that is none of their words.
    """
    if set(attributes) != set(ATTRIBUTES):
        found = ", ".join(attributes) or "none"
        raise RecipeError(
            f"protocol: unlearncanvas needs a judge of the attributes style and object, this one has {found}"
        )
    known = {_plain(word) for words in attributes.values() for word in words}
    for concept in concepts:
        if _plain(concept) not in known:
            raise RecipeError(
                f"protocol: the judge has no word for {concept!r}; its styles and objects are {', '.join(sorted(known))[:200]}"
            )
    gone = {_plain(concept) for concept in concepts}
    forget: list[str] = []
    retain: list[str] = []
    for style in attributes["style"]:
        for thing in attributes["object"]:
            (forget if {_plain(style), _plain(thing)} & gone else retain).append(prompt_of(style, thing))
    return forget, retain


def unlearncanvas(
    sampler: Sampler, judge: WordJudge, concepts: Sequence[str], rows: Mapping[str, int], seeds: int = len(SEEDS)
) -> dict[str, Any]:
    """`word_figures` over the benchmark's prompts, an image of each with each of its first `seeds` seeds.

    UA: images of prompts with a concept that are not classified as it. IRA, CRA: of all other prompts the words of the concept's
    attribute, and of the other one, that are seen. rows: of the prompts in the sampler's table. Raises RecipeError as
    `canvas_prompts`.
    """
    if not 1 <= seeds <= len(SEEDS):
        raise RecipeError(f"seeds: unlearncanvas has {len(SEEDS)} seeds, {', '.join(map(str, SEEDS))}; got {seeds}")
    forget, retain = canvas_prompts(judge.attributes, concepts)
    gone = {_plain(concept) for concept in concepts}
    covers = [" ".join(word for word in judge.expected(text).values() if _plain(word) not in gone) for text in forget]
    asked = [[Prompt(rows[text], text) for text in texts] for texts in (forget, retain)]
    found = word_figures(sampler, judge, asked[0], covers, asked[1], 0, 0, seeds=SEEDS[:seeds])
    return {**found, "protocol": "unlearncanvas", "seeds": list(SEEDS[:seeds])}


def _plain(word: str) -> str:
    return clean(word.replace("_", " ")).casefold()
