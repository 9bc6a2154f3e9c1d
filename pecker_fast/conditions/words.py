"""Names in a prompt: found in all their forms, and replaced so that the sentence stays a sentence."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pecker_fast.conditions.forms import (
    SPACELESS,
    Folded,
    derived,
    fold,
    forms,
    marks,
    plural,
    plurals,
    shared,
    singular,
    singulars,
)

_ARTICLES = ("a", "an", "the")
_DETERMINERS = (*_ARTICLES, "my", "your", "his", "her", "its", "our", "their", "this", "every", "each", "another")
# by sound, not by letter: a unicorn, a European, a one-legged; an hour, an heir
_VOWEL_SOUND = re.compile(
    r"(?!eu|ewe|one\b|once\b|uni(?![nmd])|u[bcfhjkqrst][aeiou])[aeiou]|hour|heir|honest|honou?r", re.I
)
_PREPOSITIONS = ("of", "in", "on", "at", "with", "without", "from", "by", "for", "under", "over", "near")
_BETWEEN = r"[\s_.'/・·-]"  # what may part the words of a name
_QUOTES = "\"'“”„«»()[]#@ "


def folded(text: str) -> str:
    """What two texts share that differ in nothing but case or the form of an apostrophe."""
    return text.casefold().replace("’", "'")


def several(text: str) -> list[str]:
    """The names in a text that names several, with commas between them."""
    return [name for part in re.split(r"[,;，、；]", text) if (name := part.strip())]


def filled(text: str, names: Sequence[str]) -> list[str]:
    """`text` with each of `names` in turn in the place of {}; the text itself where it has none."""
    return [put(text, ["{}"], [name]) for name in names] if "{}" in text else [text]


class Found(NamedTuple):
    """A name in a text: which of the names, where in the original text, and how it reads there when folded."""

    which: int
    start: int
    end: int
    folded: str


class Names:
    """Finds names in texts: whole words, whatever their case, accents and width, singular or plural, with blanks, hyphens,
    underscores or nothing between them; anywhere where a script has no blanks between words.

    names: at least one. related: nouns of the same thing count too (`forms.derived`), for texts that are left out alone.
    """

    def __init__(self, names: Sequence[str], related: bool = False) -> None:
        self.names = [_core(name) for name in names]
        self.pattern = re.compile(_any(self.names, related))

    def all(self, text: str) -> Iterator[Found]:
        """Each name that stands in `text`, from left to right."""
        content = fold(text)
        for match in self.pattern.finditer(content.text):
            yield _found(match, "", content)

    def search(self, text: str) -> str | None:
        """The first name as it stands in `text`; None where there is none."""
        found = next(self.all(text), None)
        return text[found.start : found.end] if found else None


def _found(match: re.Match[str], group: str, content: Folded) -> Found:
    index = int(next(name for name in match.groupdict() if name[0] in "efr" and match[name] is not None)[1:])
    start, end = match.span(group or 0)
    return Found(index, content.starts[start], content.ends[end - 1], match[group or 0])


def _core(name: str) -> str:
    """A name as it is looked for: folded, without quotation marks around it."""
    text = " ".join(fold(name).text.split())
    return text.strip(_QUOTES) or text


def _parts(core: str) -> list[str]:
    return re.split(rf"(?<=[^\W_]){_BETWEEN}+(?=[^\W_])", core)


def _any(cores: Sequence[str], related: bool) -> str:
    """Expression for any of the names: as written, then in other forms, then tagged the other way round (miku_hatsune); long
    ones first. Groups `e<index>`, `f<index>`, `r<index>`."""
    ranked = [(at, _parts(core)) for at, core in sorted(enumerate(cores), key=lambda item: -len(item[1]))]
    choices: list[str] = []
    for kind in "efr":
        alike: dict[tuple[bool, bool], list[str]] = {}
        for at, parts in ranked:
            words = [_written(part) if kind == "e" else _forms(part, related) for part in parts]
            text, ends = _joined(parts, words, cores[at]), (parts[0][0], parts[-1][-1])
            if kind == "r":
                if len(parts) != 2 or min(map(len, parts)) < 2:
                    continue
                text, ends = f"{words[1]}_{words[0]}", (parts[1][0], parts[0][-1])
            edges = tuple(re.match(f"[{SPACELESS}]", end) is None for end in ends)
            alike.setdefault((edges[0], edges[1]), []).append(f"(?P<{kind}{at}>{text})")
        choices += [_edged("|".join(texts), *edges) for edges, texts in alike.items()]
    return f"(?:{'|'.join(choices)})"


def _forms(word: str, related: bool) -> str:
    found = forms(word) | (derived(word) if related else frozenset())
    return f"(?:{'|'.join(map(_written, sorted(found, key=lambda form: (-len(form), form))))})"


def _written(word: str) -> str:
    """Expression for a word as it is; where a script has no blanks, one may stand between any two characters."""
    return "[ ・]?".join(word) if re.fullmatch(f"[{SPACELESS}]+", word) else re.escape(word)


def _joined(parts: list[str], words: list[str], core: str) -> str:
    """The words of a name one after the other; `parts` are the same as they were written."""
    text = words[0]
    for before, part, word in zip(parts, parts[1:], words[1:]):
        apart = min(len(before), len(part)) == 1 and " " in core
        text += f"{_BETWEEN}{{{'1' if apart else '0'},2}}{word}"
    return text


def _edged(text: str, before: bool, after: bool) -> str:
    """Nothing of a longer word before or after it; in scripts without blanks there is no telling."""
    word, signs = rf"[^\W_{SPACELESS}]", f"[{marks()}]"
    return f"{f'(?<!{word})(?<!{signs})' if before else ''}(?:{text}){f'(?!{word}|{signs})' if after else ''}"


@functools.lru_cache(maxsize=256)
def _in_sentence(names: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """Expression for any of `names` with its article before it and its possessive after it; and their cores."""
    cores = [_core(name) for name in names]
    article = rf"(?:(?<!\w)(?P<det>{'|'.join(_DETERMINERS)}) )?"
    return re.compile(rf"{article}(?P<name>{_any(cores, False)})(?P<own>'s(?!\w)|'(?= \w))?"), cores


def put(prompt: str, names: Sequence[str], texts: Sequence[str]) -> str:
    """`prompt` with `texts[i]` in place of `names[i]`, wherever that stands in any form.

    At most one article stays before it ("the circle", "a square" → "the square"; "a circle", "oval" → "an oval"), a
    capital that begins a sentence stays, a prompt in capitals stays one, a possessive follows the new ending, and a plural
    (of a name in the singular, and the other way round) stays one.
    """
    pattern, cores = _in_sentence(tuple(names))
    content = fold(prompt)
    done, out = 0, ""
    for match in pattern.finditer(content.text):
        found = _found(match, "name", content)
        start, end = content.starts[match.start()], content.ends[match.end() - 1]
        name = prompt[found.start : found.end]
        text, own = _in_number(texts[found.which], cores[found.which], found.folded), prompt[found.end : end]
        before = prompt[:start]
        if own and (own[1:] or (name[-1:] in "sS" and not re.search(r"(?<!\w)['‘’]", before))):
            own = own[0] if text[-1:] == "s" and text[-2:] != "ss" else f"{own[0]}{own[1:] or 's'}"
        determiner = prompt[start : found.start].rstrip() or None
        text = _after_determiner(determiner, text) + own
        if prompt.isupper():
            text = text.upper()
        elif prompt[start].isupper() and before.rstrip(" \"'“‘(")[-1:] in ("", ".", "!", "?"):
            text = text[0].upper() + text[1:]
        out += prompt[done:start] + text
        done = end
    return out + prompt[done:]


def _in_number(text: str, name: str, found: str) -> str:
    """`text` as a plural where the name was found as one, and the other way round."""
    for old, new in zip(_parts(name), _parts(found)):
        if old != new:
            if new in plurals(old):
                return _head(text, plural)
            return _head(text, singular) if new in singulars(old) else text
    return text


def _head(text: str, change: Callable[[str], str]) -> str:
    """`text` with the noun it is about changed to a plural or a singular: its last word before "of", "in" and the like."""
    words = text.split(" ")
    if change is plural and words[0].lower() in ("a", "an") and words[1:]:
        words = words[1:]
    at = next((i for i, word in enumerate(words) if i and word.lower() in _PREPOSITIONS), len(words)) - 1
    word = words[at].lower()
    if not word.isalpha() or (change is plural and (word.endswith(("ed", "ing")) or singular(word) != word)):
        return " ".join(words)
    changed = change(word)
    kept = shared(word, changed)
    return " ".join([*words[:at], words[at][:kept] + changed[kept:], *words[at + 1 :]])


def _after_determiner(determiner: str | None, text: str) -> str:
    """`text` with exactly one article or determiner, where one stood before the name."""
    if determiner is None:
        return text
    article, _, rest = text.partition(" ")
    own_article = article.lower() in _ARTICLES and bool(rest)
    if determiner.lower() not in ("a", "an"):
        return f"{determiner} {rest if own_article else text}"
    if own_article:
        return text
    return f"{'an' if _VOWEL_SOUND.match(text) else 'a'} {text}"
