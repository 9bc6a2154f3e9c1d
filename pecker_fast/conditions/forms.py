"""A word in its forms: without accents, width and case, as plural and as singular, in what is derived from it.

English rules, deliberately generous: a form that no language has does no harm. Forms that are other words do; the common ones
are taken out (`_OTHER_WORDS`).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# scripts that put no blanks between words: a name is found anywhere in them
SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u31ff\u3400-\u9fff\ua960-\ua97f"
    "\uac00-\ud7ff\uf900-\ufaff\U00020000-\U000323af"
)
_LETTERS = str.maketrans(dict(zip("øØłŁđĐı", "oOlLdDi")) | {"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"})
_SIGNS = str.maketrans(dict.fromkeys("’‘ʼʻ＇`´", "'") | dict.fromkeys("‐‑‒–—−", "-"))
# RedCircle, 1girl; not McDonald, iPhone, 3D, 2nd
_INSIDE = re.compile(r"(?<=[A-Za-z][A-Za-z][a-z])(?=[A-Z][a-z]{2})|(?<=[0-9])(?=[A-Za-z]{3})|(?<=[A-Za-z]{3})(?=[0-9])")


class Folded(NamedTuple):
    """A text as it is compared, and which characters of the original each of its own stands for: [starts[i], ends[i])."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]


def fold(text: str) -> Folded:
    """`text` in lower case without accents and full-width forms, words that are written together parted by a blank."""
    if text.isascii() and "`" not in text and not _INSIDE.search(text):
        return Folded(text.lower(), range(len(text)), range(1, len(text) + 1))
    letters = [(at, letter) for at, char in enumerate(text) for letter in _plain(char)]
    cuts = {match.start() for match in _INSIDE.finditer("".join(letter for _, letter in letters))}
    folded: list[tuple[str, int, int]] = []
    for i, (at, letter) in enumerate(letters):
        if i in cuts:
            folded.append((" ", at, at))
        folded += [(lower, at, at + 1) for lower in letter.casefold()]
    return Folded("".join(char for char, *_ in folded), [at for _, at, _ in folded], [end for *_, end in folded])


@functools.lru_cache(maxsize=1 << 14)
def _plain(char: str) -> str:
    """One character without accent (Latin and Greek) and width, its case kept; nothing for invisible ones."""
    if unicodedata.category(char) == "Cf" or "\u0300" <= char <= "\u036f":
        return ""
    wide = unicodedata.normalize("NFKC", char.translate(_SIGNS))
    parts = unicodedata.normalize("NFD", wide)
    if unicodedata.name(parts[0], "").startswith(("LATIN", "GREEK")):
        wide = "".join(part for part in parts if not "\u0300" <= part <= "\u036f")
    return wide.translate(_LETTERS)


@functools.cache
def marks() -> str:
    """Vowel signs and accents that belong to the letter before them, as the inside of a regular expression's brackets."""
    found = (chr(code) for code in range(0x370, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    return "".join(char for char in found if not re.match(f"[{SPACELESS}]", char))


_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "louse": "lice", "ox": "oxen", "die": "dice", "criterion": "criteria",
    "phenomenon": "phenomena", "automaton": "automata", "bacterium": "bacteria", "datum": "data", "medium": "media",
    "genus": "genera", "corpus": "corpora", "cherub": "cherubim", "seraph": "seraphim", "quiz": "quizzes", "penny": "pence",
}  # fmt: skip
_VES = {
    "calf", "half", "elf", "self", "shelf", "wolf", "leaf", "loaf", "thief", "sheaf", "hoof", "scarf", "wharf", "dwarf",
    "knife", "wife", "life",
}  # fmt: skip
_OES = {"hero", "potato", "tomato", "echo", "torpedo", "mosquito", "buffalo", "volcano", "domino", "mango", "tornado"}
_OTHER_WORDS = {
    *(
        "a",
        "an",
        "as",
        "at",
        "be",
        "by",
        "do",
        "does",
        "go",
        "goes",
        "ha",
        "has",
        "he",
        "his",
        "i",
        "in",
        "is",
        "it",
        "its",
    ),
    *("mar", "me", "my", "new", "news", "no", "of", "on", "or", "so", "the", "this", "to", "up", "us", "was", "we"),
}
_HISS = ("s", "x", "z", "ch", "sh")


def _ends(word: str, old: str, new: str, least: int = 0) -> set[str]:
    return {word[: len(word) - len(old)] + new} if word.endswith(old) and len(word) >= least else set()


@functools.lru_cache(maxsize=1 << 12)
def plurals(word: str) -> frozenset[str]:
    """Every plural a folded word may have; none for what is not of Latin letters."""
    if not (word.isascii() and word.isalpha() and len(word) > 1):
        return frozenset()
    found = set() if word.endswith("s") else {f"{word}s"}
    found |= {f"{word}es"} if word.endswith((*_HISS, "o")) else set()
    found |= _ends(word, "y", "ies") | _ends(word, "f", "ves") | _ends(word, "fe", "ves") | _ends(word, "z", "zzes")
    found |= (
        _ends(word, "us", "i", 5) | _ends(word, "is", "es", 4) | _ends(word, "a", "ae", 5) | _ends(word, "um", "a", 6)
    )
    found |= _ends(word, "ex", "ices", 5) | _ends(word, "ix", "ices", 5) | _ends(word, "eau", "eaux")
    for one, many in _PLURALS.items():
        found |= _ends(word, one, many)
    return frozenset(found - _OTHER_WORDS - {word})


@functools.lru_cache(maxsize=1 << 12)
def singulars(word: str) -> frozenset[str]:
    """Every singular a folded word may have, if it is a plural."""
    if not (word.isascii() and word.isalpha() and len(word) > 2):
        return frozenset()
    found = set() if word.endswith(("ss", "us", "is")) else _ends(word, "s", "")
    if word.endswith(tuple(f"{hiss}es" for hiss in (*_HISS, "o"))):
        found |= _ends(word, "es", "", 5) | _ends(word, "zzes", "z") | _ends(word, "sses", "s")
    found |= _ends(word, "ies", "y") | _ends(word, "ves", "f") | _ends(word, "ves", "fe") | _ends(word, "i", "us", 5)
    found |= _ends(word, "es", "is", 4) | _ends(word, "ae", "a", 5) | _ends(word, "ia", "ium", 6)
    found |= _ends(word, "ices", "ex", 6) | _ends(word, "ices", "ix", 6) | _ends(word, "eaux", "eau")
    for one, many in _PLURALS.items():
        found |= _ends(word, many, one)
    return frozenset(found - _OTHER_WORDS - {word})


def forms(word: str) -> frozenset[str]:
    """A folded word, its plurals and its singulars."""
    return frozenset({word}) | plurals(word) | singulars(word)


_NOUNS = ("ity", "ities", "ness", "ism", "isms", "ist", "ists")
_UNRELATED = {"university", "gravity", "vanity", "community", "facility", "city", "authority"}


def derived(word: str) -> frozenset[str]:
    """Nouns of the same thing (nude: nudity, nudist; violent: violence), and the words that such a noun is made of."""
    found: set[str] = set()
    for one in (word, *singulars(word)):
        if not (one.isascii() and one.isalpha() and len(one) > 3):
            continue
        base = one[:-1] if one[-1] in "ey" else one
        found |= {f"{base}{end}" for end in _NOUNS[:2] if one[-2:] not in ("or", "er")}
        found |= {f"{base}{end}" for end in _NOUNS[3:]} | {f"{one}ness"} | _ends(one, "y", "iness")
        found |= (
            _ends(one, "ent", "ence")
            | _ends(one, "ence", "ent")
            | _ends(one, "ant", "ance")
            | _ends(one, "ance", "ant")
        )
        found |= _ends(one, "ism", "ist") | _ends(one, "ist", "ism") | _ends(one, "ness", "", 8)
        if one not in _UNRELATED:
            for root in _ends(one, "ity", "", 6) | _ends(one, "ity", "e", 6):
                found |= {root, *plurals(root)}
    return frozenset(found - _OTHER_WORDS - {word} - _UNRELATED)


_ENDINGS = ("woman", "man", "child", "person", "foot", "tooth")  # of other words too: snowman, grandchild
_REGULAR = {"human", "german", "roman", "shaman", "ottoman", "talisman", "caiman"}
_NO_PLURAL = {"omen", "specimen", "abdomen", "ramen", "amen", "yemen"}
_SES = {"bus", "gas", "lens", "virus", "cactus", "octopus", "circus", "atlas", "canvas", "iris", "campus", "walrus"}


def plural(word: str) -> str:
    """The plural that is most probable, of a word in lower case."""
    if word in _PLURALS:
        return _PLURALS[word]
    for end in _ENDINGS:
        if word.endswith(end) and word not in _REGULAR:
            return word.removesuffix(end) + _PLURALS[end]
    if word in _VES or word.endswith(("wife", "wolf", "shelf", "leaf")):
        return word.removesuffix("e")[:-1] + "ves"
    if word.endswith(_HISS) or word in _OES:
        return f"{word}es"
    return f"{word[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{word}s"


def singular(word: str) -> str:
    """The singular that is most probable, of a word in lower case; the word itself where it is no plural."""
    for one, many in _PLURALS.items():
        if word == many or (one in _ENDINGS and word.endswith(many) and word not in _NO_PLURAL):
            return word.removesuffix(many) + one
    if word.endswith("ves") and (found := {f"{word[:-3]}f", f"{word[:-3]}fe"} & _VES):
        return found.pop()
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("sses", "xes", "ches", "shes")) or word[:-2] in _OES | _SES:
        return word[:-2]
    return word[:-1] if word.endswith("s") and word not in _SES and singulars(word) else word


def shared(a: str, b: str) -> int:
    """Letters that two words have in common at their start."""
    return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
