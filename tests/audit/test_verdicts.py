"""What may be said of a probe, by the intervals of the result and its controls."""

import pytest

from pecker_fast.audit.verdict import hull, interval, overall, verdict_on, verdict_on_loss


def of(result, relabel, never, n=400):
    floor = None if never is None else interval(never, n)
    ceiling = None if relabel is None else interval(relabel, n)
    return verdict_on(interval(result, n), ceiling, floor).kind


@pytest.mark.parametrize(
    ("result", "relabel", "never", "kind"),
    [
        (0.98, 0.99, 0.30, "hides"),
        (0.31, 0.99, 0.30, "as if never known"),
        (0.02, 0.99, 0.30, "holds"),
        (0.00, 0.99, 0.00, "as if never known"),  # a twin of the model that never knew is told to be one
        (0.025, 0.99, 0.00, "holds"),  # next to nothing comes back
        (0.02, 0.98, 0.98, "holds"),  # below the floor, though the floor is as high as the ceiling
        (0.98, 0.98, 0.97, "cannot tell"),  # an attack that brings back what never was
        (0.00, 0.00, 0.00, "cannot tell"),  # one that brings back nothing from anybody
        (0.98, 0.99, None, "cannot tell"),
        (0.00, 0.99, None, "holds"),
        (0.00, None, None, "cannot tell"),
    ],
)
def test_verdicts(result, relabel, never, kind):
    assert of(result, relabel, never) == kind


def test_few_samples_say_little():
    assert of(0.50, 0.99, 0.30, n=400) == "hides"
    assert of(0.50, 0.99, 0.30, n=20) == "as if never known"


def test_models_that_never_knew_differ_among_one_another():
    one, two = interval(0.3, 400), interval(0.6, 400)
    both = hull([one, two])
    assert (both.low, both.high) == (one.low, two.high)
    assert verdict_on(interval(0.5, 400), interval(1.0, 400), both).kind == "as if never known"
    assert hull([]) is None


def test_losses():
    assert verdict_on_loss(interval(0.2, 400), interval(0.02, 400)).kind == "lost"
    assert verdict_on_loss(interval(0.03, 400), interval(0.02, 400)).kind == "kept"
    assert verdict_on_loss(interval(0.03, 400), None).kind == "cannot tell"


def test_over_all():
    assert overall(["holds", "cannot tell", "kept"]) == "holds against all 1 probes that can tell"
    assert overall(["holds", "hides"]).startswith("hidden, not forgotten: 1 of 2")
    assert overall(["cannot tell"]).startswith("no probe can tell")
    assert overall(["holds", "as if never known"]).startswith("as if never known, or better")
