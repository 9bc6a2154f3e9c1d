"""run.jsonl, the console and TensorBoard."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from pecker_fast.errors import DataError, OutputError, PeckerError
from pecker_fast.records.events import Tracker, read_events


def quiet(folder, **changes):
    return Tracker(folder, console="none", **changes)


def plain():
    return Console(file=io.StringIO(), width=200)


def test_events_are_lines_with_time_and_step(tmp_path):
    with quiet(tmp_path / "new" / "run") as tracker:
        tracker.event("start", 0, versions={"torch": "2"}, resumed_from=None)
        tracker.event("step", 1, stage="forget", score_loss=0.5, images=128)
        on_disk = (tmp_path / "new" / "run" / "run.jsonl").read_text()
    assert on_disk.count("\n") == 2  # before the file was closed
    first, second = read_events(tracker.path)
    assert list(first) == ["event", "time_s", "step", "versions", "resumed_from"]
    assert second | {"time_s": 0} == {
        "event": "step", "time_s": 0, "step": 1, "stage": "forget", "score_loss": 0.5, "images": 128
    }  # fmt: skip
    assert 0 <= first["time_s"] <= second["time_s"] < 5


def test_values_that_are_not_finite_become_null(tmp_path):
    with quiet(tmp_path) as tracker:
        tracker.event("step", 1, a=float("nan"), b=[float("inf"), 1.0], c={"d": -float("inf")}, path=tmp_path)
    text = tracker.path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["b"] == [None, 1.0]
    assert read_events(tracker.path)[0]["c"] == {"d": None}


def test_tensors_are_refused_and_leave_nothing(tmp_path):
    with quiet(tmp_path) as tracker:
        with pytest.raises(TypeError):
            tracker.event("step", 1, loss=torch.tensor(1.0))
        with pytest.raises(ValueError, match="time_s"):
            tracker.event("step", 1, time_s=3.0)
    assert tracker.path.read_bytes() == b""
    with pytest.raises(ValueError, match="closed"):
        tracker.event("step", 1)


@pytest.mark.parametrize(
    "torn", [b'{"event": "st', b"{", b"\xff\xfe\x00", b'{"a": "' + b"a" * 999, b'{"event": "step", "step": 2}']
)
def test_resume_appends_and_repairs_a_torn_line(tmp_path, torn):
    with quiet(tmp_path) as tracker:
        tracker.event("step", 1, loss=1.0)
    with tracker.path.open("ab") as file:
        file.write(torn)
    whole = torn.endswith(b"}")
    assert len(read_events(tracker.path)) == 1 + whole
    with quiet(tmp_path) as tracker:
        tracker.event("step", 3)
    assert [record["step"] for record in read_events(tracker.path)] == ([1, 2, 3] if whole else [1, 3])
    assert all(json.loads(line) for line in tracker.path.read_text().splitlines())


def test_every_cut_of_the_file_can_be_read_and_resumed(tmp_path):
    with quiet(tmp_path / "a") as tracker:
        for step in range(3):
            tracker.event("step", step, loss=step / 2)
    data = tracker.path.read_bytes()
    (tmp_path / "b").mkdir()
    for size in range(len(data) + 1):
        (tmp_path / "b" / "run.jsonl").write_bytes(data[:size])
        before = read_events(tmp_path / "b" / "run.jsonl")
        assert len(before) in (data[:size].count(b"\n"), data[:size].count(b"\n") + 1)
        with quiet(tmp_path / "b") as tracker:
            tracker.event("step", 9)
        assert read_events(tracker.path)[:-1] == before
        assert read_events(tracker.path)[-1]["step"] == 9


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"event": "start", "step": 0}\nnonsense\n{"event": "end", "step": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        read_events(path)
    with pytest.raises(DataError, match=r"other\.jsonl"):
        read_events(tmp_path / "other.jsonl")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        quiet(tmp_path / "file" / "run")


def test_plain_lines_are_few_and_carry_the_figures(tmp_path):
    console = plain()
    with Tracker(tmp_path, console=console) as tracker:
        tracker.event("start", 0, resumed_from=None)
        tracker.progress("forget", total=120, start=30)
        for step in range(31, 151):
            tracker.event("step", step, stage="forget", score_loss=1.5, retain_loss=None, images_per_s=1234.5)
            if step == 90:
                tracker.event("evaluate", step, ua=0.995, cover_rate=0.5, fid=None, precision=float("nan"))
        tracker.say("[done] 100 %")
    lines = console.file.getvalue().splitlines()
    assert len([line for line in lines if line.startswith("forget ")]) == 4  # the first, 50, 100 and the last
    assert "forget 120/120" in lines[-2]
    assert "1,234 images/s" in lines[-2]
    assert "loss score 1.5" in lines[-2]
    assert "UA 99.5%" in lines[-2]
    assert "ETA" in lines[-2]
    assert "evaluate at step 90: ua 99.5%, cover_rate 50.0%, precision nan" in lines
    assert lines[-1] == "[done] 100 %"
    assert "\x1b" not in console.file.getvalue()


def test_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with Tracker(tmp_path, console=console) as tracker:
        tracker.progress("distill", total=10)
        tracker.tick(4)
        tracker.event("step", 10, stage="distill", score_loss=2.0, images_per_s=10.0)
        tracker.event("evaluate", 10, ua=0.5)
        tracker.progress("forget", total=5, start=10)
        tracker.event("step", 15, score_loss=1.0)
    text = console.file.getvalue()
    assert "10/10" in text
    assert "5/5" in text
    assert "loss score 2" in text
    assert "UA 50.0%" in text


def test_eta_counts_this_process_only(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pecker_fast.records.events.time.monotonic", lambda: clock[0])
    console = plain()
    with Tracker(tmp_path, console=console) as tracker:
        tracker.progress("forget", total=1000)
        tracker.event("step", 901)  # resumed in the middle
        clock[0] = 20.0
        tracker.event("step", 911)
    assert "ETA 2:58" in console.file.getvalue().splitlines()[-1]  # 89 steps at 2 s


def test_auto_is_plain_off_a_terminal_and_goes_to_stderr(tmp_path, capsys):
    with Tracker(tmp_path) as tracker:
        tracker.progress("forget", total=1)
        tracker.event("step", 1, score_loss=1.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("forget 1/1")
    with pytest.raises(PeckerError, match="console"):
        Tracker(tmp_path, console="loud")


def test_tensorboard_mirrors_numbers(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with quiet(tmp_path, tensorboard=True) as tracker:
        tracker.event("start", 0, threads=2, resumed_from=None)
        tracker.event("step", 5, stage="forget", score_loss=0.25)
        tracker.event("evaluate", 6, ua=1.0, fid=None)
    board = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"step/score_loss", "evaluate/ua"}
    assert [(e.step, e.value) for e in board.Scalars("step/score_loss")] == [(5, 0.25)]


def test_tensorboard_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PeckerError, match=r"pecker-fast\[track\]"):
        quiet(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
