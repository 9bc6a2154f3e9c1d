"""What a text encoder reads of a prompt: its first 77 tokens or so, and nothing of what stands beyond them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pecker_fast.errors import RecipeError

SHOWN_LETTERS = 200
SHOWN = 3  # prompts that are told


class PromptWindow:
    """Tokens of prompts as the encoders of a model get them.

    tokenizers: one for each text encoder. prompts: all that will be asked for.
    """

    def __init__(self, tokenizers: Sequence[Any], prompts: Iterable[str]) -> None:
        self.read: dict[str, tuple[int, ...]] = {}
        self.lost: dict[str, str] = {}
        """Prompts that are too long, and what is cut off."""
        texts = list(dict.fromkeys(prompts))
        for tokenizer in tokenizers:
            limit = tokenizer.model_max_length
            for text, ids in zip(texts, tokenizer(texts, truncation=False, verbose=False).input_ids):
                self.read[text] = (*self.read.get(text, ()), *ids[: limit - 1], -1)
                if len(ids) > limit and text not in self.lost:
                    self.lost[text] = tokenizer.decode(ids[limit - 1 : -1]).strip()

    def check(self, forget: Sequence[str], cover: Sequence[str], retain: Sequence[str]) -> None:
        """Raise RecipeError where a prompt to forget is, to the encoders, the same as its cover or as a caption to keep."""
        for prompt, other in zip(forget, cover):
            if self.read[prompt] == self.read[other]:
                why = self._why(prompt, other)
                raise RecipeError(
                    f"forget: {_shown(prompt)} and its cover {_shown(other)} are the same tokens to the text encoder; {why}"
                )
        gone = {self.read[prompt]: prompt for prompt in forget}
        for caption in retain:
            if (same := gone.get(self.read[caption])) is not None:
                raise RecipeError(
                    f"retain: {_shown(caption)} is the same tokens to the text encoder as the forget prompt "
                    f"{_shown(same)}; {self._why(caption, same)}"
                )

    def _why(self, *prompts: str) -> str:
        if any(prompt in self.lost for prompt in prompts):
            return "what differs stands beyond its window; shorten the prompt, or move the concept to its start"
        return "it does not know what differs; write that otherwise"

    def notes(self, prompts: Iterable[str]) -> list[str]:
        """A line for each of the first of `prompts` that lose something, and how many more there are."""
        cut = [prompt for prompt in dict.fromkeys(prompts) if prompt in self.lost]
        notes = [
            f"prompt {_shown(prompt)}: longer than the text encoder's window, {_shown(self.lost[prompt])} is cut off"
            for prompt in cut[:SHOWN]
        ]
        more = len(cut) - SHOWN
        return [*notes, f"{more} more prompts are longer than the text encoder's window"] if more > 0 else notes


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…")
