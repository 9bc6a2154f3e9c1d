"""audit.json: taken up where it was left, and believed only where it is whole and of the same audit."""

import json
from dataclasses import replace

import pytest
from test_probes import subjects
from toy import COVER, FORGET, scene

from pecker_fast.audit import AUDIT, RESULT, Audit, read_audit, relabelled
from pecker_fast.errors import DataError, Interrupted

PROBES = ("condition", "disturbed", "neighbours")


def audit(folder, told=lambda *unit: None, probes=PROBES, seed=0):
    result = replace(relabelled(scene().before, (FORGET,), (COVER,)), role=RESULT)
    return Audit(replace(scene(), seed=seed), subjects(result), probes, folder, {"of": "toy"}, told)


def test_an_interrupted_audit_goes_on_and_ends_in_the_same_bytes(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    audit(whole).run()
    done: list[tuple] = []

    def stop(probe, subject, number, total):
        done.append((probe, subject))
        if len(done) == 6:
            raise Interrupted(2, "stopped")

    with pytest.raises(Interrupted):
        audit(parts, stop).run()
    assert read_audit(parts / AUDIT)["complete"] is False
    ran = []
    goes_on = audit(parts)
    unit = goes_on.unit
    goes_on.unit = lambda probe, role: ran.append((probe.name, role)) or unit(probe, role)
    goes_on.run()
    assert len(ran) == 12 - 5
    assert (parts / AUDIT).read_bytes() == (whole / AUDIT).read_bytes()
    for path in (whole / "audit").iterdir():
        assert (parts / "audit" / path.name).read_bytes() == path.read_bytes()


def test_another_seed_begins_anew_and_further_probes_are_added(tmp_path):
    audit(tmp_path, probes=("disturbed",)).run()
    both = audit(tmp_path, probes=("neighbours",)).run()
    assert set(both["probes"]) == {"disturbed", "neighbours"}
    assert set(audit(tmp_path, probes=("neighbours",), seed=1).run()["probes"]) == {"neighbours"}


def test_a_damaged_record_is_not_believed(tmp_path, capsys):
    audit(tmp_path, probes=("neighbours",)).run()
    content = json.loads((tmp_path / AUDIT).read_text())
    content["probes"]["neighbours"]["verdict"] = "kept, surely"
    (tmp_path / AUDIT).write_text(json.dumps(content))
    with pytest.raises(DataError, match="sha256"):
        read_audit(tmp_path / AUDIT)
    assert audit(tmp_path, probes=("neighbours",)).run()["probes"]["neighbours"]["verdict"] == "kept"
    assert "begins anew" in capsys.readouterr().err


def test_controls_of_another_audit_are_taken_over_where_they_are_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    first = audit(one).run()
    second = audit(two)
    second.controls = one / AUDIT
    second.subjects = {**second.subjects, RESULT: replace(second.subjects["never knew"], role=RESULT)}
    ran, unit = [], second.unit
    second.unit = lambda probe, role: ran.append(role) or unit(probe, role)
    found = second.run()
    assert ran == [RESULT] * len(PROBES)
    for name in PROBES:
        for role in ("before", "relabel", "never knew"):
            assert found["probes"][name]["figures"][role] == first["probes"][name]["figures"][role]
    other = audit(two, seed=1)
    other.controls = one / AUDIT
    with pytest.raises(DataError, match="other controls"):
        other.run()
