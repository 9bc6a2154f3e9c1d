"""The prompts of a text-to-image recipe: what to forget, what to draw in its place, what to keep.

Pure text: nothing here looks at a model. A concept is found in all its forms (`words.Names`); in the cover prompt it is
replaced by the cover text, with the article, the capital at the start of a sentence, the possessive and the number put right.
"""

from __future__ import annotations

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
    distinct,
    one_line,
    prompts_or_file,
    read_lines,
)
from pecker_fast.conditions.near import Near, Phrases, words_of
from pecker_fast.conditions.prompt_file import SUFFIXES, clean
from pecker_fast.conditions.words import Names, filled, folded, put, several
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
    other_forms: tuple[str, ...] = ()
    """Those of them that name it in another form than the recipe does."""
    near: tuple[tuple[str, str], ...] = ()
    """(caption, word) of captions in `retain` with a word that comes near what is forgotten."""


class _Concept(NamedTuple):
    name: str
    cover: str


class _Kept(NamedTuple):
    """Captions to keep, and what became of the others."""

    texts: tuple[str, ...]
    left_out: int
    other_forms: tuple[str, ...]
    near: tuple[tuple[str, str], ...]


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
    that name it), `{keywords, prompts, place}` (every subject with every keyword before or after it). Commas in a concept
    part several names: each is found and replaced, {} stands for each in turn.
    `cover`: the text in a concept's place, or a list with one for each mapping; as many names with commas as the concept has,
    or one text for all of them; for plain prompts one prompt, or as many as there are prompts (list or file); for keywords
    null, which is the plain subject, or one prompt.
    `retain`: captions to keep, as a file or a list; those that name a concept, a keyword or a whole plain prompt in any form
    are left out.
    `unconditional`: text of guidance's unconditional branch; None = empty, "keywords" = all keywords with commas.
    `folders`: where files are looked for that are not found as given.

    A prompt file is UTF-8 text, one prompt a line, or a table, see `read_prompts`. Prompts that
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
    names = [concept.name for concept in concepts] + keywords
    chosen = _merge(pairs, names)
    kept = _kept(retain, chosen, names, folders)
    return PromptPlan(
        forget=tuple(text for text, _ in chosen.values()),
        cover=tuple(text for _, text in chosen.values()),
        retain=kept.texts,
        unconditional=_unconditional(unconditional, keywords),
        concepts=tuple((concept.name, concept.cover) for concept in concepts),
        left_out=kept.left_out,
        other_forms=kept.other_forms,
        near=kept.near,
    )


def concept_names(forget: Any) -> list[str]:
    """The names that {} stands for in the prompts of a recipe's `forget`; none for plain prompts, keywords and classes."""
    items = forget if isinstance(forget, list | tuple) else [forget]
    mappings = [item for item in items if isinstance(item, Mapping) and isinstance(item.get("concept"), str)]
    return [clean(name) for mapping in mappings for name in several(mapping["concept"])]


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
        elif isinstance(value, str) and value.lower().endswith(SUFFIXES):
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
        names = _names(key, mapping)
        texts = several(cover.text) if len(names) > 1 else [cover.text]
        for name, text in zip(names, texts if len(texts) == len(names) else [cover.text] * len(names)):
            old = concepts.setdefault(folded(name), _Concept(name, text))
            if old.cover != text:
                raise RecipeError(
                    f"{cover.where}: {show(name)} already has the cover {show(old.cover)}; give it one cover"
                )
    named = Names([concept.name for concept in concepts.values()]) if concepts else None
    for cover in filter(None, covers):
        if named and (found := named.search(cover.text)):
            raise RecipeError(
                f"{cover.where}: {show(cover.text)} itself names {show(found)}, which is to be forgotten; "
                "choose another text"
            )
    return list(concepts.values())


def _names(key: str, mapping: Mapping[str, Any]) -> list[str]:
    """The names that stand in a mapping's concept."""
    text = one_line(f"{key}.concept", mapping["concept"], "the words that name the concept").text
    names = several(text)
    for name in names or [text]:
        if not any(map(str.isalnum, name)):
            raise RecipeError(f"{key}.concept: {show(name)} holds no word; write the words that name the concept")
    return names


def _concept_pairs(
    key: str, mapping: Mapping[str, Any], concepts: list[_Concept], folders: Sequence[Path]
) -> Iterator[tuple[Line, str]]:
    """(prompt, cover prompt) of one concept; every concept of the run is replaced in the cover prompt."""
    own = {folded(name) for name in _names(key, mapping)}
    names = [concept.name for concept in concepts if folded(concept.name) in own]
    what, named = ", ".join(names), Names(names)
    if "captions" in mapping:
        lines = read_lines(f"{key}.captions", mapping["captions"], folders, "captions")
        found = [line for line in lines if named.search(line.text)]
        if not found:
            raise RecipeError(f"{key}.captions: none of the {len(lines)} captions names {show(what)}")
    else:
        found = []
        for line in read_lines(f"{key}.prompts", mapping["prompts"], folders, "prompts"):
            for text in filled(line.text, names):
                if "{}" in text:
                    raise RecipeError(f"{line.where}: {{}} must stand as a word of its own in {show(line.text)}")
                if not named.search(text):
                    raise RecipeError(
                        f"{line.where}: {show(line.text)} does not name {show(what)}; "
                        "write it, or {} in its place, or use captions in place of prompts"
                    )
                found.append(Line(line.where, text))
    every, covers = zip(*concepts)
    return ((line, put(line.text, every, covers)) for line in found)


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
    named = Names([keyword.text for keyword in keywords])
    for subject in subjects:
        if found := named.search(subject.text):
            raise RecipeError(
                f"{subject.where}: the subject {show(subject.text)} already names the keyword {show(found)}; "
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


def _merge(pairs: Iterable[tuple[Line, str]], names: list[str]) -> dict[str, tuple[str, str]]:
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
    forbidden = Names(names) if names else None
    for text, cover in chosen.values():
        found = forbidden.search(cover) if forbidden else None
        if found or folded(cover) in chosen:
            named = f"names {show(found)}" if found else "is a forget prompt"
            raise RecipeError(f"cover: {show(cover)}, the cover prompt of {show(text)}, {named} itself; change it")
    return chosen


def _kept(retain: Any, chosen: Mapping[str, tuple[str, str]], names: list[str], folders: Sequence[Path]) -> _Kept:
    """The captions to keep: none that names what is forgotten in any form."""
    if retain is None:
        raise RecipeError(
            "retain: a text-to-image model needs captions to keep; give a file with one caption a line, or a list"
        )
    captions = [line.text for line in distinct(read_lines("retain", retain, folders, "captions"))]
    forbidden = Names(names, related=True) if names else Phrases(text for text, _ in chosen.values())
    as_written = {folded(name) for name in names}
    kept: list[str] = []
    other: list[str] = []
    for text in captions:
        found = None if folded(text) in chosen else forbidden.search(text)
        if found is None and folded(text) not in chosen:
            kept.append(text)
        elif found is not None and folded(found) not in (as_written if names else folded(text)):
            other.append(text)
    if not kept:
        raise RecipeError(f"retain: all {len(captions)} captions name what is to be forgotten; add others")
    near = Near(names or _changed(chosen))
    pairs = ((text, near.find(text)) for text in kept)
    return _Kept(
        tuple(kept), len(captions) - len(kept), tuple(other), tuple((text, word) for text, word in pairs if word)
    )


def _changed(chosen: Mapping[str, tuple[str, str]]) -> list[str]:
    """The words of plain prompts that their cover prompts do not have: what is forgotten."""
    return [
        " ".join(word for word in words_of(text) if word not in covered)
        for text, cover in chosen.values()
        for covered in [set(words_of(cover))]
    ]


def _unconditional(value: Any, keywords: list[str]) -> str:
    key = "guidance.unconditional"
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(f"{key}: expected text, got {show(value)}")
    if value == "keywords" and not keywords:
        raise RecipeError(f"{key}: keywords stands for forget.keywords, which the recipe does not have")
    return checked(key, ", ".join(keywords) if value == "keywords" else value)
