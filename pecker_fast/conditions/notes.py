"""What a user is told of their captions before training, a line each."""

from __future__ import annotations

from pecker_fast.conditions.prompts import PromptPlan

SHOWN = 5  # captions of a line
SHOWN_LETTERS = 60


def notes_of(plan: PromptPlan) -> list[str]:
    """Captions left out because of another form than the recipe's own, and captions kept that come near; the first few."""
    notes = []
    if plan.other_forms:
        texts = _first([_quoted(text) for text in plan.other_forms])
        notes.append(f"retain: left out, because they name what is forgotten in another form: {texts}")
    if plan.near:
        texts = _first([f"{_quoted(text)} ({word})" for text, word in plan.near])
        notes.append(
            f"retain: kept, although they come near what is forgotten: {texts}; take out what should not be kept"
        )
    return notes


def _quoted(text: str) -> str:
    return repr(text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…")


def _first(texts: list[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return f"{len(texts)} caption{'s' if len(texts) > 1 else ''}, {', '.join(texts[:SHOWN])}{more}"
