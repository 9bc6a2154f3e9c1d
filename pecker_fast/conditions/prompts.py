"""The prompts of a text-to-image recipe: what to forget, what to draw in its place, what to keep.

Pure text: nothing here looks at a model. A concept is matched as whole words, whatever the case; in the cover prompt it
is replaced by the cover text, with the article, the capital at the start of a sentence and the possessive put right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pecker_fast.conditions.lines import (
    MAX_PROMPTS,
    Line,
    check_length,
    checked,
    clean,
    distinct,
    one_line,
    prompts_or_file,
    read_lines,
)
from pecker_fast.conditions.words import folded, put, whole_words
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import closest, show

__all__ = ["PromptPlan", "plan_prompts"]

_FORMS = (("concept", "prompts"), ("concept", "captions"), ("keywords", "prompts", "place"))
_KEYS = tuple(dict.fromkeys(key for form in _FORMS for key in form))
_PLACES = ("both", "before", "after")


@dataclass(frozen=True)
class PromptPlan:
    """All texts of a run, without duplicates, in the order of the recipe."""

    forget: tuple[str, ...]
    """Prompts to forget, at least one."""
    cover: tuple[str, ...]
    """For each of `forget`, the prompt whose images take its place."""
    retain: tuple[str, ...]
    """Captions to keep, at least one; none of them names what is forgotten."""
    unconditional: str
    """Text of the unconditional branch of guidance."""
    concepts: tuple[tuple[str, str], ...]
    """(concept, cover text) pairs; empty for plain prompts and for keywords."""
    left_out: int
    """Captions left out of `retain` because they name what is forgotten."""


class _Concept(NamedTuple):
    name: str
    cover: str


def plan_prompts(
    forget: Any,
    cover: Any,
    retain: Any,
    *,
    folders: Sequence[Path] = (),
    unconditional: str | None = None,
) -> PromptPlan:
    """The prompts of a run, from the values of `forget`, `cover` and `retain` as they stand in a recipe.

    `forget`: a prompt or a prompt file, a list of prompts, or one of these mappings or a list of them:
    `{concept, prompts}` (every prompt names the concept or holds {} in its place), `{concept, captions}` (those captions
    that name it), `{keywords, prompts, place}` (every subject with every keyword before or after it).
    `cover`: the text in a concept's place, or a list with one for each mapping; for plain prompts one prompt, or as many
    as there are prompts (list or file); for keywords null, which is the plain subject, or one prompt.
    `retain`: captions to keep, as a file or a list; those that name a concept or a keyword are left out.
    `unconditional`: text of guidance's unconditional branch; None = empty, "keywords" = all keywords with commas.
    `folders`: where files are looked for that are not found as given.

    A prompt file is UTF-8 text, one prompt a line; blank lines and lines that start with # are skipped. Prompts that
    differ in nothing but case are one. Raises RecipeError, one line that starts with the dotted key.
    """
    mappings = _mappings(forget)
    concepts: list[_Concept] = []
    keywords: list[str] = []
    pairs: list[tuple[Line, str]] = []
    if mappings:
        covers = _mapping_covers(cover, mappings)
        concepts = _concepts(mappings, covers)
        words = {
            key: distinct(read_lines(f"{key}.keywords", mapping["keywords"], folders, "keywords"))
            for key, mapping in mappings
            if "keywords" in mapping
        }
        keywords = [line.text for line in distinct(line for lines in words.values() for line in lines)]
        for (key, mapping), put in zip(mappings, covers):
            if key in words:
                pairs += _keyword_pairs(key, mapping, words[key], put, folders)
            else:
                pairs += _concept_pairs(key, mapping, concepts, folders)
    else:
        pairs = _plain_pairs(forget, cover, folders)
    forbidden = whole_words([concept.name for concept in concepts] + keywords)
    chosen = _merge(pairs, forbidden)
    kept, left_out = _kept(retain, chosen, forbidden, folders)
    return PromptPlan(
        forget=tuple(text for text, _ in chosen.values()),
        cover=tuple(text for _, text in chosen.values()),
        retain=kept,
        unconditional=_unconditional(unconditional, keywords),
        concepts=tuple((concept.name, concept.cover) for concept in concepts),
        left_out=left_out,
    )


def _mappings(forget: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """(dotted key, mapping) of each concept or keyword mapping after a check of its keys; none for plain prompts."""
    if isinstance(forget, Mapping):
        found: list[tuple[str, Any]] = [("forget", forget)]
    elif isinstance(forget, list | tuple) and any(isinstance(item, Mapping) for item in forget):
        found = [(f"forget.{at}", item) for at, item in enumerate(forget)]
    else:
        return []
    for key, mapping in found:
        if not isinstance(mapping, Mapping):
            raise RecipeError(f"{key}: expected a mapping like the others of the list, got {show(mapping)}")
        for name in mapping:
            if name not in _KEYS:
                close = closest(str(name), _KEYS)
                hint = f", did you mean {key}.{close}?" if close else f"; a mapping holds {_forms()}"
                raise RecipeError(f"{key}.{str(name)[:80]}: unknown key{hint}")
        form = next((form for form in _FORMS if set(form[:2]) <= set(mapping) <= set(form)), None)
        if form is None:
            raise RecipeError(f"{key}: expected {_forms()}, got {' and '.join(mapping) or 'none of them'}")
    return found


def _forms() -> str:
    return "concept with prompts, concept with captions, or keywords with prompts"


def _mapping_covers(cover: Any, mappings: list[tuple[str, Mapping[str, Any]]]) -> list[Line | None]:
    """The cover of each mapping; None is the plain subject of keywords."""
    if isinstance(cover, list | tuple):
        if len(cover) != len(mappings):
            raise RecipeError(f"cover: {len(cover)} texts for {len(mappings)} concepts; give one, or one for each")
        given = [(f"cover.{at}", item) for at, item in enumerate(cover)]
    else:
        given = [("cover", cover)] * len(mappings)
    found: list[Line | None] = []
    for (key, value), (_, mapping) in zip(given, mappings):
        if value is None and "keywords" in mapping:
            found.append(None)
        elif isinstance(value, str) and value.lower().endswith(".txt"):
            raise RecipeError(f"{key}: expected the text that takes the concept's place, got the file {show(value)}")
        else:
            plain = " (null = the plain subject)" if "keywords" in mapping else ""
            found.append(one_line(key, value, f"the text that takes the place of what is forgotten{plain}"))
    return found


def _concepts(mappings: list[tuple[str, Mapping[str, Any]]], covers: list[Line | None]) -> list[_Concept]:
    """The concepts of all mappings, each once, after a check against all cover texts."""
    concepts: dict[str, _Concept] = {}
    for (key, mapping), cover in zip(mappings, covers):
        if "concept" not in mapping:
            continue
        assert cover is not None
        name = one_line(f"{key}.concept", mapping["concept"], "the words that name the concept").text
        if not any(map(str.isalnum, name)):
            raise RecipeError(f"{key}.concept: {show(name)} holds no word; write the words that name the concept")
        old = concepts.setdefault(folded(name), _Concept(name, cover.text))
        if old.cover != cover.text:
            raise RecipeError(f"{cover.where}: {show(name)} already has the cover {show(old.cover)}; give it one cover")
    named = whole_words([concept.name for concept in concepts.values()])
    for cover in filter(None, covers):
        if named and (found := named.search(cover.text)):
            raise RecipeError(
                f"{cover.where}: {show(cover.text)} itself names {show(found[0])}, which is to be forgotten; "
                "choose another text"
            )
    return list(concepts.values())


def _concept_pairs(
    key: str, mapping: Mapping[str, Any], concepts: list[_Concept], folders: Sequence[Path]
) -> Iterator[tuple[Line, str]]:
    """(prompt, cover prompt) of one concept; every concept of the run is replaced in the cover prompt."""
    name = folded(clean(mapping["concept"]))
    concept = next(concept for concept in concepts if folded(concept.name) == name)
    named = whole_words([concept.name])
    assert named is not None
    if "captions" in mapping:
        lines = read_lines(f"{key}.captions", mapping["captions"], folders, "captions")
        found = [line for line in lines if named.search(line.text)]
        if not found:
            raise RecipeError(f"{key}.captions: none of the {len(lines)} captions names {show(concept.name)}")
    else:
        found = []
        for line in read_lines(f"{key}.prompts", mapping["prompts"], folders, "prompts"):
            text = put(line.text, ["{}"], [concept.name])
            if "{}" in text:
                raise RecipeError(f"{line.where}: {{}} must stand as a word of its own in {show(line.text)}")
            if not named.search(text):
                raise RecipeError(
                    f"{line.where}: {show(line.text)} does not name {show(concept.name)}; "
                    "write it, or {} in its place, or use captions in place of prompts"
                )
            found.append(Line(line.where, text))
    names, covers = zip(*concepts)
    return ((line, put(line.text, names, covers)) for line in found)


def _keyword_pairs(
    key: str, mapping: Mapping[str, Any], keywords: list[Line], cover: Line | None, folders: Sequence[Path]
) -> Iterator[tuple[Line, str]]:
    """(prompt, cover prompt) of every subject with every keyword; `both` lays before and after out as a chessboard."""
    place = mapping.get("place", "both")
    if place not in _PLACES:
        close = closest(place, _PLACES) if isinstance(place, str) else None
        hint = f"; did you mean {close}?" if close else ""
        raise RecipeError(f"{key}.place: expected one of {', '.join(_PLACES)}, got {show(place)}{hint}")
    subjects = distinct(read_lines(f"{key}.prompts", mapping["prompts"], folders, "subjects"))
    if (count := len(subjects) * len(keywords)) > MAX_PROMPTS:
        raise RecipeError(
            f"{key}.keywords: {len(subjects)} subjects with {len(keywords)} keywords make {count} prompts "
            f"(at most {MAX_PROMPTS}); shorten a list"
        )
    named = whole_words([keyword.text for keyword in keywords])
    for subject in subjects:
        if named and (found := named.search(subject.text)):
            raise RecipeError(
                f"{subject.where}: the subject {show(subject.text)} already names the keyword {show(found[0])}; "
                "write it without"
            )
    for (i, subject), (j, keyword) in product(enumerate(subjects), enumerate(keywords)):
        before = place == "before" or (place == "both" and (i + j) % 2 == 0)
        text = f"{keyword.text} {subject.text}" if before else f"{subject.text} {keyword.text}"
        yield Line(subject.where, text), cover.text if cover else subject.text


def _plain_pairs(forget: Any, cover: Any, folders: Sequence[Path]) -> list[tuple[Line, str]]:
    """(prompt, cover prompt) of plain prompts."""
    prompts = prompts_or_file("forget", forget, folders, "a prompt, a prompt file, a list or a mapping")
    covers = prompts_or_file("cover", cover, folders, "a prompt to draw in place of what is forgotten")
    if len(covers) == 1:
        covers *= len(prompts)
    if len(covers) != len(prompts):
        raise RecipeError(f"cover: {len(covers)} prompts for {len(prompts)} forget prompts; give one, or one for each")
    return [(prompt, cover.text) for prompt, cover in zip(prompts, covers)]


def _merge(pairs: Iterable[tuple[Line, str]], forbidden: re.Pattern[str] | None) -> dict[str, tuple[str, str]]:
    """(prompt, cover prompt) by folded prompt, after a check that no cover prompt brings back what is forgotten."""
    chosen: dict[str, tuple[str, str]] = {}
    for line, cover in pairs:
        for what, text in (("the prompt", line.text), ("the cover prompt", cover)):
            check_length(line.where, text, what)
        if folded(line.text) == folded(cover):
            raise RecipeError(f"{line.where}: {show(line.text)} has itself as cover prompt; change one of the two")
        old = chosen.setdefault(folded(line.text), (line.text, cover))
        if folded(old[1]) != folded(cover):
            raise RecipeError(f"{line.where}: {show(line.text)} stands here twice with different covers; take one out")
    for text, cover in chosen.values():
        found = forbidden.search(cover) if forbidden else None
        if found or folded(cover) in chosen:
            named = f"names {show(found[0])}" if found else "is a forget prompt"
            raise RecipeError(f"cover: {show(cover)}, the cover prompt of {show(text)}, {named} itself; change it")
    return chosen


def _kept(
    retain: Any, chosen: Mapping[str, tuple[str, str]], forbidden: re.Pattern[str] | None, folders: Sequence[Path]
) -> tuple[tuple[str, ...], int]:
    """The captions to keep, and the number of those left out."""
    if retain is None:
        raise RecipeError(
            "retain: a text-to-image model needs captions to keep; give a file with one caption a line, or a list"
        )
    captions = [line.text for line in distinct(read_lines("retain", retain, folders, "captions"))]
    kept = [text for text in captions if folded(text) not in chosen and not (forbidden and forbidden.search(text))]
    if not kept:
        raise RecipeError(f"retain: all {len(captions)} captions name what is to be forgotten; add others")
    return tuple(kept), len(captions) - len(kept)


def _unconditional(value: Any, keywords: list[str]) -> str:
    key = "guidance.unconditional"
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(f"{key}: expected text, got {show(value)}")
    if value == "keywords" and not keywords:
        raise RecipeError(f"{key}: keywords stands for forget.keywords, which the recipe does not have")
    return checked(key, ", ".join(keywords) if value == "keywords" else value)
