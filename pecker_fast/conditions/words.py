"""Words in a prompt: found whole, whatever their case, and replaced so that the sentence stays a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ARTICLES = ("a", "an", "the")
_DETERMINERS = (*_ARTICLES, "my", "your", "his", "her", "its", "our", "their", "this", "every", "each", "another")
# by sound, not by letter: a unicorn, a European, a one-legged; an hour, an heir
_VOWEL_SOUND = re.compile(
    r"(?!eu|ewe|one\b|once\b|uni(?![nmd])|u[bcfhjkqrst][aeiou])[aeiou]|hour|heir|honest|honou?r", re.I
)


def folded(text: str) -> str:
    """What two texts share that differ in nothing but case or the form of an apostrophe."""
    return text.casefold().replace("’", "'")


def _words(names: Iterable[str], capture: bool) -> str:
    """Expression for any of `names` as whole words, longest first; group `n<index>` where `capture`."""
    ranked = sorted(enumerate(names), key=lambda item: -len(item[1]))
    texts = [(at, re.sub("['’]", "['’]", re.escape(name))) for at, name in ranked]
    return rf"(?<!\w)(?:{'|'.join(f'(?P<n{at}>{text})' if capture else text for at, text in texts)})(?!\w)"


def whole_words(names: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of `names` as whole words, whatever the case; None without names."""
    return re.compile(_words(names, capture=False), re.I) if names else None


def _in_sentence(names: Iterable[str]) -> str:
    """Expression for any of `names` with its article before it and its possessive after it."""
    return (
        rf"(?:(?<!\w)(?P<det>{'|'.join(_DETERMINERS)}) )?{_words(names, capture=True)}(?P<own>['’]s(?!\w)|['’](?= \w))?"
    )


def put(prompt: str, names: Sequence[str], texts: Sequence[str]) -> str:
    """`prompt` with `texts[i]` in place of `names[i]`, wherever that stands as whole words.

    At most one article stays before it ("the circle", "a square" → "the square"; "a circle", "oval" → "an oval"), a
    capital that begins a sentence stays, a prompt in capitals stays one, and a possessive follows the new ending.
    """
    pattern = re.compile(_in_sentence(names), re.I)

    def text_for(match: re.Match[str]) -> str:
        at = next(at for at in range(len(texts)) if match[f"n{at}"] is not None)
        name, text, own = match[f"n{at}"], texts[at], match["own"] or ""
        before = prompt[: match.start()]
        if own and (own[1:] or (name[-1:] in "sS" and not re.search(r"(?<!\w)['‘’]", before))):
            own = own[0] if text[-1:] == "s" and text[-2:] != "ss" else f"{own[0]}{own[1:] or 's'}"
        text = _after_determiner(match["det"], text) + own
        if prompt.isupper():
            return text.upper()
        starts = before.rstrip(" \"'“‘(")[-1:] in ("", ".", "!", "?")
        return text[0].upper() + text[1:] if starts and match[0][0].isupper() else text

    return pattern.sub(text_for, prompt)


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
