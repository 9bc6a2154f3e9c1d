"""Real models: a second one that never saw a 0 is told to be one, and a copied row is told to hide."""

from pathlib import Path

import pytest

from pecker_fast.audit import RELABEL, RESULT, Audit
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.auditing import Asked, staged

TWIN = Path(__file__).parent / "twin"  # another seed, half the training; model.json has the command
TELLING = ("prompts", "condition", "halfway", "otherwise")


@pytest.fixture(scope="module")
def scene():
    return staged(TWIN, Asked(against=("digits_without_0",), samples=200), load_recipe("digits"))


def verdicts(scene, role):
    stage, subjects = scene
    found = Audit(stage, {**subjects, RESULT: subjects[role]}, TELLING).run()
    return {name: one["verdict"] for name, one in found["probes"].items()}


@pytest.mark.slow
def test_a_second_model_that_never_knew_is_told_to_be_one(scene):
    assert verdicts(scene, RESULT) == dict.fromkeys(TELLING, "as if never known")


@pytest.mark.slow
def test_a_copied_row_is_told_to_hide_by_at_least_two_probes(scene):
    found = verdicts(scene, RELABEL)
    assert list(found.values()).count("hides") >= 2
