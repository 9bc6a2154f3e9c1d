"""The check of a GPU: its dry run, what goes wrong in it, and its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench" / "gpu")]

import check  # noqa: E402
import plan  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402

EACH = "env,smoke,step,select,iteration-rows-1,products,norm"  # what is no command of its own


def dry_run(folder, *options, **environment):
    command = [sys.executable, "bench/gpu/check.py", "--output", str(folder), *options]
    variables = {**os.environ, "BENCH_SCALE": "tiny", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("stages", [EACH, pytest.param("", marks=pytest.mark.slow)])
def test_a_dry_run_passes_every_stage(stages, tmp_path):
    done = dry_run(tmp_path, "--stages", stages, "--seconds", "5000")
    found = rows.read(tmp_path)
    assert done.returncode == 0, done.stderr + (tmp_path / check.LOG).read_text()[-3000:]
    ran = {row["stage"]: row["rc"] for row in found if "stage" in row}
    assert ran == dict.fromkeys((stage.name for stage in plan.chosen(stages)), 0)
    assert not [row for row in found if "error" in row]
    smoke = [row for row in found if "smoke" in row]
    assert len(smoke) > 25
    assert all(row["ok"] for row in smoke)
    tables = report.tables(found)
    assert "| env | passed |" in tables
    assert tables.count("not measured") == len(report.GOALS)  # there was no GPU


def test_a_wrong_kernel_is_red_in_the_smoke_stage(tmp_path):
    """The library counts one too many: the checks say so, and the stage fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "from pecker_kernels import native\nright = native.popcount\nnative.popcount = lambda bits: 1 + right(bits)\n"
    )
    done = dry_run(tmp_path / "out", "--stages", "smoke", PYTHONPATH=f"{tmp_path}:{ROOT / 'kernels'}")
    assert done.returncode == 1
    found = rows.read(tmp_path / "out")
    failed = [row["smoke"] for row in found if row.get("ok") is False]
    assert failed[0] == "popcount"
    assert "pack" not in failed
    assert found[-1]["rc"] == 1
    assert "Failed in smoke: popcount" in report.tables(found)


def test_a_red_or_hanging_stage_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "native_library", lambda folder: "found")
    stages = [
        plan.Stage("bad", "nothing"),
        plan.Stage("slow", "env", limit_s=0.2),
        plan.Stage("good", "tests", ("nowhere",)),
    ]
    monkeypatch.setenv("BENCH_SCALE", "tiny")
    assert check.run(stages, tmp_path, 1000) is False
    ends = {row["stage"]: row["rc"] for row in rows.read(tmp_path) if "stage" in row}
    assert ends["bad"] == 1
    assert ends["slow"] == "out of time"
    assert set(ends) == {"bad", "slow", "good"}
    assert check.run(stages[:1], tmp_path, check.LEAST_S - 1) is False
    assert rows.read(tmp_path)[-1] == {"stage": "bad", "skipped": "no time left"}


def test_stages_by_name():
    assert [stage.name for stage in plan.chosen("step,iteration")] == [
        name for name in plan.NAMES if name == "step" or name.startswith("iteration-")
    ]
    assert plan.chosen("") == list(plan.PLAN)
    assert sum(stage.limit_s for stage in plan.PLAN[:7]) <= 560  # what matters most fits
    with pytest.raises(ValueError, match="STAGES: 'smok' is no stage; they are env, smoke"):
        plan.chosen("smok")


def test_without_a_gpu_it_says_so(tmp_path):
    done = dry_run(tmp_path, BENCH_SCALE="full", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch finds no CUDA device here")
    assert not (tmp_path / rows.RESULTS).exists()
    assert dry_run(tmp_path, "--stages", "smok").stderr.startswith("error: STAGES: 'smok' is no stage")


def test_goals_are_read_from_the_rows(tmp_path):
    for what, device_ms in (
        (report.FUSED, 6.0),
        ("masked element 0.5, as shipped", 4.0),
        ("masked element 0.1, as shipped", 3.0),
    ):
        rows.put(tmp_path, what=what, device_ms=device_ms, host_ms=50.0)
    rows.put(tmp_path, what=f"threshold {report.SDXL}", host_ms=3.5, device_ms=None)
    rows.put(tmp_path, what="copy", host_ms=1.0, device_ms=1.0, tb_s=4.0)
    rows.put(tmp_path, what="dense (0.9, 0.999)", host_ms=1.0, device_ms=1.0, tb_s=3.9)
    with (tmp_path / rows.RESULTS).open("a") as file:
        file.write('{"what": "cut o')  # a kill in the middle of a row
    found = report.latest(rows.read(tmp_path))
    words = {goal.name: report.judged(goal, found) for goal in report.GOALS}
    assert words["element mask 0.5, against torch fused dense"] == ("1.5 ×", "beyond")
    assert words["element mask 0.1, against torch fused dense"] == ("2 ×", "missed")
    assert words["threshold of 2.57e9"] == ("3.5 ms", "met")
    assert words["dense step, share of the copy bandwidth"] == ("97.5 %", "beyond")
    assert words["average"] == ("–", "not measured")
    assert json.loads((tmp_path / rows.RESULTS).read_text().splitlines()[0])["what"] == report.FUSED
