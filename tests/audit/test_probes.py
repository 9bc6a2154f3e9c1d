"""The probes in a world where it is known what is hidden and what is gone."""

from dataclasses import replace

import pytest
import torch
from toy import BUDGET, COVER, FORGET, judge, knowing, never, scene

from pecker_fast.audit import NEVER, PROBES, RELABEL, RESULT, Audit, Subject, relabelled
from pecker_fast.evaluate import Judge


def subjects(result):
    before = scene().before
    return {
        RESULT: result,
        "before": before,
        RELABEL: relabelled(before, (FORGET,), (COVER,)),
        NEVER: Subject(NEVER, never(), 50),
    }


def audited(result, probes=tuple(PROBES), **changed):
    return Audit(replace(scene(), **changed), subjects(result), probes).run()


def test_a_copied_row_is_told_to_hide():
    relabel = relabelled(scene().before, (FORGET,), (COVER,))
    found = audited(replace(relabel, role=RESULT), ("condition", "relearn"))
    assert found["probes"]["condition"]["verdict"] == "hides"
    figures = found["probes"]["condition"]["figures"]
    assert figures["result"]["recovery"] > 0.95
    assert figures["never knew"]["recovery"] < 0.05
    assert figures["before"]["recovery"] == 1.0
    assert found["verdict"].startswith("hidden, not forgotten")


def test_a_model_that_never_knew_is_never_told_to_hide():
    found = audited(Subject(RESULT, never(seed=1), 50))
    verdicts = {name: one["verdict"] for name, one in found["probes"].items()}
    assert "hides" not in verdicts.values()
    assert verdicts["condition"] in ("holds", "as if never known")


def test_vectors_leave_all_weights_as_they_were():
    relabel = relabelled(scene().before, (FORGET,), (COVER,))
    before = {name: p.clone() for name, p in relabel.network.named_parameters()}
    for name in PROBES:
        PROBES[name].run(scene(), relabel)
    assert all(torch.equal(p, before[name]) for name, p in relabel.network.named_parameters())


def test_the_curve_starts_at_no_step_and_rises():
    relabel = relabelled(scene().before, (FORGET,), (COVER,))
    found = PROBES["condition"].run(scene(), relabel)
    curve = found.curves[found.worst]
    assert curve[0][0] == 0
    assert curve[-1][0] == BUDGET.steps
    assert curve[-1][1] > curve[0][1]
    assert found.to_half is not None
    assert found.distance == pytest.approx(1.0, abs=1.0)


def test_what_one_judge_alone_sees_does_not_count():
    """An attack on a judge: the second one sees nothing there."""

    def blind(images):
        return images.flatten(1), torch.nn.functional.one_hot(torch.full((len(images),), COVER), 5).float()

    relabel = relabelled(scene().before, (FORGET,), (COVER,))
    assert PROBES["condition"].run(scene(Judge(blind, 5)), relabel).recovery == 0
    assert PROBES["condition"].run(scene(judge()), relabel).recovery > 0.95


def test_every_probe_brings_a_shown_concept_back_from_the_model_before():
    found = audited(Subject(RESULT, knowing(), 50))
    for name in ("condition", "halfway", "relearn", "disturbed", "otherwise"):
        assert found["probes"][name]["figures"]["before"]["recovery"] > 0.9, name
    assert found["probes"]["neighbours"]["verdict"] == "kept"


def test_a_lost_neighbour_is_told():
    broken = knowing()
    with torch.no_grad():
        broken.unet.class_embedding.weight[2] = broken.unet.class_embedding.weight[3]
    found = audited(Subject(RESULT, broken, 50), ("neighbours",))
    nearest = found["probes"]["neighbours"]["figures"]["result"]["variants"]
    assert found["probes"]["neighbours"]["verdict"] == ("lost" if "class 2" in nearest else "kept")


def test_many_steps_as_well_as_one():
    """A denoiser is fitted by its error on images, noise is found by running DDIM backwards, and half-way it goes on from s."""
    before = Subject("before", knowing(), None, 3)
    many = replace(scene(), before=before)
    relabel = relabelled(before, (FORGET,), (COVER,))
    assert PROBES["condition"].run(many, relabel).recovery > 0.95
    assert PROBES["condition"].run(many, Subject(NEVER, never(), None, 3)).recovery < 0.05
    assert "forgotten condition, s = 0.2" in PROBES["halfway"].run(many, relabel).variants
    assert PROBES["noise"].run(many, before).recovery == 1.0
    assert "6 steps" in PROBES["otherwise"].run(many, relabel).variants


def test_equal_seeds_find_equal_numbers_and_others_others():
    relabel = replace(relabelled(scene().before, (FORGET,), (COVER,)), role=RESULT)
    first, again = (audited(relabel, ("condition", "disturbed")) for _ in range(2))
    assert first == again
    other = audited(relabel, ("condition", "disturbed"), seed=1)
    assert other["probes"] != first["probes"]


def test_two_forgotten_classes_are_each_looked_for():
    """One vector cannot draw both: each gets vectors of its own, and is counted where it comes back."""
    two = scene()
    two = replace(two, world=replace(two.world, forget=(0, 2), cover=(1, 3), judged=(0, 2), kept=(1, 3, 4)))
    relabel = relabelled(two.before, (0, 2), (1, 3))
    found = PROBES["condition"].run(two, relabel)
    assert found.variants["from class 0, rate 0.1"] > 0.95
    assert found.variants["from class 2, rate 0.1"] > 0.95


def test_condition_and_noise_together():
    budget = replace(BUDGET, together=True)
    relabel = relabelled(scene().before, (FORGET,), (COVER,))
    found = PROBES["condition"].run(scene(budget=budget), relabel)
    assert found.variants["from class 0, rate 0.1, and noise"] > 0.95


def test_blocks_do_not_change_what_is_seen(monkeypatch):
    relabel = relabelled(scene().before, (FORGET,), (COVER,))
    whole = {name: PROBES[name].run(scene(), relabel) for name in ("halfway", "neighbours", "prompts")}
    monkeypatch.setattr("pecker_fast.audit.scene.NUMBERS", 7 * 16)
    for name, found in whole.items():
        parts = PROBES[name].run(scene(), relabel)
        assert (parts.variants, parts.samples) == (found.variants, found.samples)
        assert torch.equal(parts.images, found.images)
