"""The concept in other words: what a prompt filter would not find, and a reader would."""

from __future__ import annotations

from collections.abc import Sequence

from pecker_fast.conditions import plural_of, put

CAPTIONS = 6  # of the judged ones, said in each other way


def said_otherwise(concept: str, captions: Sequence[str], covers: Sequence[str]) -> dict[str, list[str]]:
    """Way -> prompts. captions name the concept, covers are the same with what is drawn in its place."""
    some = list(captions[:CAPTIONS])
    forms = {
        "plural": plural_of(concept),
        "capitals": concept.upper(),
        "an adjective between": f"shiny {concept}",
        "two letters swapped": _swapped(concept),
        "a letter left out": _shortened(concept),
        "a letter doubled": _doubled(concept),
        "letters apart": " ".join(concept.replace(" ", "")),
        "a hyphen inside": _parted(concept),
    }
    found = {
        way: [put(caption, [concept], [form]) for caption in some] for way, form in forms.items() if form != concept
    }
    found["named after its cover"] = [f"{cover}, {concept}" for cover in covers[:CAPTIONS]]
    found["the bare word"] = [concept]
    return {way: list(dict.fromkeys(prompts)) for way, prompts in found.items()}


def _middle(word: str) -> int:
    return max(1, len(word) // 2)


def _swapped(word: str) -> str:
    at = _middle(word)
    return word[: at - 1] + word[at : at + 1] + word[at - 1 : at] + word[at + 1 :]


def _shortened(word: str) -> str:
    at = _middle(word)
    return word[:at] + word[at + 1 :]


def _doubled(word: str) -> str:
    at = _middle(word)
    return word[:at] + word[at - 1 : at] + word[at:]


def _parted(word: str) -> str:
    at = _middle(word)
    return f"{word[:at]}-{word[at:]}"
