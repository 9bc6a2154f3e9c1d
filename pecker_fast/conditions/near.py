"""Captions that hold a whole plain prompt, and captions that come near what is forgotten without naming it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from pecker_fast.conditions.forms import SPACELESS, derived, fold, forms, shared, singular

_LITTLE = {
    *(
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "by",
        "for",
        "from",
        "her",
        "his",
        "in",
        "is",
        "it",
        "its",
        "near",
        "of",
        "on",
    ),
    *("or", "over", "that", "the", "their", "this", "to", "under", "with", "without"),
}
STEM = 5  # letters that two words have in common at their start
TYPO = 5  # letters of a word in which one may be wrong; of the words of one name fewer


class Phrases:
    """Whole prompts inside other texts: word for word, whatever case, accents, punctuation and number."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = {_bare(words_of(text)): text for text in texts}
        self.lengths = {len(words) for words in self.texts if not _LITTLE.issuperset(words)}

    def search(self, text: str) -> str | None:
        """A prompt that `text` holds, as it was given; None without one."""
        words = _bare(words_of(text))
        for length in self.lengths:
            for at in range(len(words) - length + 1):
                if (found := self.texts.get(words[at : at + length])) is not None:
                    return found
        return None


def _bare(words: list[str]) -> tuple[str, ...]:
    """Words in the singular, without the article at the start."""
    return tuple(
        singular(word) for word in (words[1:] if words[:1] in (["a"], ["an"], ["the"]) and words[1:] else words)
    )


class Near:
    """Words that come near those of what is forgotten: its single words in any form, words that hold or share their stem,
    words with a letter wrong."""

    def __init__(self, texts: Iterable[str]) -> None:
        names = [[word for word in words_of(text) if word not in _LITTLE] for text in texts]
        self.words = {word for name in names for word in name if len(word) > 2}
        self.forms = {form for word in self.words for form in forms(word) | derived(word)}
        self.names = [name for name in names if 1 < len(name) < 6]
        self._near = functools.cache(self._alike)

    def find(self, text: str) -> str | None:
        """The first word of `text` that comes near, or the first words that do together; None without any."""
        words = words_of(text)
        if (word := next(filter(self._near, words), None)) is not None:
            return word
        for name in self.names:
            for group in zip(*(words[at:] for at in range(len(name)))):
                if all(min(len(a), len(b)) > 2 and (a == b or _one_apart(a, b)) for a, b in zip(group, name)):
                    return " ".join(group)
        return None

    def _alike(self, word: str) -> bool:
        return word in self.forms or (word not in _LITTLE and any(_related(word, own) for own in self.words))


def words_of(text: str) -> list[str]:
    """The words of a text, folded; single characters of scripts without blanks."""
    return re.findall(rf"[{SPACELESS}]|[^\W_{SPACELESS}]+", fold(text).text)


def _related(word: str, own: str) -> bool:
    shorter, longer = sorted((word, own), key=len)
    if len(shorter) > 3 and shorter in longer and (shorter == own or len(shorter) >= STEM):
        return True
    common = shared(word, own)
    if common >= STEM and common > 0.6 * len(longer):
        return True
    return len(shorter) >= TYPO and _one_apart(word, own)


def _one_apart(a: str, b: str) -> bool:
    """Whether one letter added, left out, changed or swapped with its neighbour makes the one out of the other."""
    start = shared(a, b)
    a, b = a[start:], b[start:]
    if len(a) == len(b):
        return a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])
    return a[1:] == b if len(a) > len(b) else a == b[1:]
