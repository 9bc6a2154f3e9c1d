"""When it is said that something was forgotten, and when not."""

import pytest

from pecker_fast.evaluate import share, verdict_of
from pecker_fast.evaluate.verdict import LEVEL

SEEN = {"ua": 0.02, "samples": 2000}


def kind(ua, samples=2000, before=SEEN, **more):
    return verdict_of({"before": before, "after": {"ua": ua, "samples": samples}, **more}).kind


def test_only_where_the_interval_is_above_the_level_and_above_before():
    assert kind(0.99) == "forgotten"
    assert kind(0.10) == "seen"
    assert kind(LEVEL + 0.001) == "seen"  # of 2,000 samples the interval still reaches below
    assert kind(1.0, samples=12) == "seen"  # few samples say little
    assert kind(0.99, before={"ua": 0.985, "samples": 2000}) == "unseen before"
    assert kind(0.99, before=None) == "seen"  # nobody knows what it was


def test_never_after_no_steps_and_never_unjudged():
    assert kind(1.0, forget_steps=0) == "not trained"
    assert verdict_of({"after": {"ua": 1.0, "samples": 2000}, "before": SEEN}, steps=0).kind == "not trained"
    for metrics in (None, {}, {"after": None}, {"after": {"ua": None}}, {"after": {"ua": "high"}}, {"after": [1]}):
        assert verdict_of(metrics, 5).kind == "not judged"
        assert verdict_of(metrics, 0).kind == "not trained"


@pytest.mark.parametrize(
    ("ua", "steps", "said"),
    [
        (0.99, 5, "has forgotten it"),
        (0.10, 5, "was trained to forget it; the judge still sees it in 90.0 %"),
        (0.99, 0, "was not trained to forget it (0 steps)"),
        (None, 5, "was trained to forget it (not judged)"),
    ],
)
def test_what_is_said(ua, steps, said):
    verdict = verdict_of({"before": SEEN, "after": {"ua": ua, "samples": 2000}}, steps)
    assert verdict.said_of("it") == said
    assert ("has forgotten" in verdict.said_of("it")) == (verdict.kind == "forgotten")
    if ua is not None:
        assert f"UA {100 * ua:.1f} % (" in verdict.line()
        assert "of 2000 samples, 2.0 % before" in verdict.line()


def test_a_share_has_the_interval_beside_it_else_the_one_of_its_samples():
    row = {"ua": 0.5, "samples": 100, "intervals": {"ua": [0.1, 0.9]}}
    assert (share(row, "ua").low, share(row, "ua").high) == (0.1, 0.9)
    found = share({"ua": 0.5, "samples": 100}, "ua")
    assert 0.39 < found.low < 0.41
    assert found.opposite().high == pytest.approx(1 - found.low)
    for row in ({"ua": 0.5}, {"ua": 1.5, "samples": 3}, {"ua": True, "samples": 3}, {"ua": 0.5, "samples": 0}):
        assert share(row, "ua") is None
