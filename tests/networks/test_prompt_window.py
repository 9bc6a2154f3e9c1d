"""Prompts beyond the text encoder's window: the same tokens are refused, what is cut off is told."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import LENGTH, tiny_tokenizer

from pecker_fast.errors import RecipeError
from pecker_fast.networks import PromptWindow

LONG = " ".join(["red"] * (LENGTH - 2))  # fills the window: it has a start and an end of its own


def window(*prompts):
    return PromptWindow([tiny_tokenizer(), tiny_tokenizer(length=LENGTH + 2)], prompts)


def test_what_differs_beyond_the_window_is_refused():
    circle, square = f"{LONG} blue blue circle", f"{LONG} blue blue square"
    with pytest.raises(
        RecipeError, match=r"^forget: .*circle' and its cover .* the same tokens .*; what differs stands beyond"
    ):
        window(circle, square).check([circle], [square], [])
    with pytest.raises(
        RecipeError, match=r"^retain: .* as the forget prompt .*circle'; what differs stands beyond its window"
    ):
        window(circle, square, "star").check([circle], ["star"], [square])
    one = f"{LONG} circle"  # the second encoder reads one word more
    found = window(one, f"{LONG} square")
    found.check([one], [f"{LONG} square"], [])
    assert found.lost == {one: "circle", f"{LONG} square": "square"}


def test_a_prompt_that_just_fits_loses_nothing():
    found = window(LONG, f"{LONG} circle", "a red circle")
    found.check(["a red circle"], [LONG], [f"{LONG} circle"])
    assert found.lost == {f"{LONG} circle": "circle"}


def test_what_the_encoder_does_not_tell_apart_is_refused():
    with pytest.raises(RecipeError, match="the same tokens to the text encoder; it does not know what differs"):
        window("a Circle", "a circle").check(["a Circle"], ["a circle"], [])


def test_the_first_prompts_are_told_with_what_is_cut_off():
    prompts = [f"{LONG} {word} star" for word in ("circle", "square", "cat", "dog", "left")]
    found = window(*prompts, "a dog")
    notes = found.notes([*prompts, "a dog", prompts[0]])
    assert notes[0] == f"prompt {prompts[0]!r}: longer than the text encoder's window, 'circle star' is cut off"
    assert len(notes) == 4
    assert notes[3] == "2 more prompts are longer than the text encoder's window"
    assert found.notes(["a dog"]) == []
