"""Output never fails a run: terminals without the characters, readers that went away, closed descriptors, full disks."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from pecker_fast import cli, terminal
from pecker_fast.cli.verb import show
from pecker_fast.files import writing
from pecker_fast.records import Tracker, read_events

ROOT = Path(__file__).parents[1]
CODINGS = ("ascii", "iso-8859-1", "cp1252", "gbk", "utf-8")
TEXT = "α … 1×1 → é “x” \udce9"


class Out(io.TextIOWrapper):
    """A stream of a given encoding, whose bytes can be looked at; `tty`: it says it is a terminal."""

    def __init__(self, coding, tty=False):
        super().__init__(io.BytesIO(), encoding=coding, errors="strict", write_through=True)
        self.tty = tty

    def isatty(self):
        return self.tty

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


@contextlib.contextmanager
def broken_pipe():
    """A text stream whose reader has gone."""
    reading, writing_end = os.pipe()
    os.close(reading)
    with open(writing_end, "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize("coding", CODINGS)
def test_what_an_encoding_lacks_is_escaped(coding):
    out = Out(coding)
    terminal.Tolerant(out).write(TEXT)
    shown = out.text()
    assert shown == TEXT.encode(coding, "backslashreplace").decode(coding)
    assert ("é" in shown) == (coding != "ascii")


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("coding", CODINGS)
def test_commands_and_tables_in_every_encoding(monkeypatch, coding, tty):
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Out(coding, tty))
    assert cli.main(["recipes", "keys"]) == 0
    assert cli.main(["train", "--help"]) == 0
    assert cli.main(["train", "nope×"]) == 2
    table = Table("α", "before")
    table.add_row("UA ≥ 1", "–")
    show(table)
    show([("α", None, 0.5)], ("key", "×", "y"))
    assert "mask.density" in sys.stdout.text()
    assert "no such recipe" in sys.stderr.text()


@pytest.mark.parametrize("columns", ["0", "1", "10"])
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_narrow_and_dumb_terminals(monkeypatch, columns, term, tmp_path):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Out("utf-8", tty=True))
    assert cli.main(["recipes", "keys"]) == 0
    assert cli.main(["--help"]) == 0
    show([("mask.density", "number", 0.5)], ("key", "type", "default"))
    assert "mask.density" in sys.stdout.text()
    with Tracker(tmp_path) as tracker:
        tracker.progress("forget", total=2)
        tracker.event("step", 1, score_loss=1.0)
        tracker.event("step", 2, score_loss=1.0)
        tracker.say("the end")
    assert "the end" in sys.stderr.text()
    assert ("\x1b[" in sys.stderr.text()) == (term != "dumb")


@pytest.mark.parametrize("coding", ["ascii", "gbk"])
def test_progress_in_every_encoding_without_the_command_line(monkeypatch, tmp_path, coding):
    for tty in (False, True):
        monkeypatch.setattr(sys, "stderr", Out(coding, tty))
        with Tracker(tmp_path) as tracker:
            tracker.progress("forget", total=2)
            tracker.event("step", 1, score_loss=1.0, images_per_s=3.0)
            tracker.say(TEXT)
            terminal.warn(TEXT)
        assert "warning: " in sys.stderr.text()
        assert "forget" in sys.stderr.text()


def test_a_reader_that_went_away_ends_nothing(monkeypatch, tmp_path):
    with broken_pipe() as out, broken_pipe() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert cli.main(["recipes", "keys"]) == 0
        assert cli.main(["train", "nope"]) == 2
        with Tracker(tmp_path) as tracker:  # of a library's user: no command line around it
            tracker.progress("forget", total=2)
            for step in (1, 2):
                tracker.event("step", step, score_loss=1.0)
                tracker.say("still here")
        terminal.warn("nobody reads this")
    assert [event["step"] for event in read_events(tmp_path / "run.jsonl")] == [1, 2]


def test_a_console_of_the_callers_may_break(tmp_path):
    with broken_pipe() as out, Tracker(tmp_path, console=Console(file=out)) as tracker:
        for _ in range(3):
            tracker.say("x" * 10_000)
    closed = io.StringIO()
    closed.close()
    with Tracker(tmp_path, console=Console(file=closed)) as tracker:
        tracker.say("x")


def test_streams_that_are_not_there(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["recipes", "list"]) == 0
    assert cli.main(["train", "nope"]) == 2
    assert not terminal.takes_a_bar()
    assert sys.stdout is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_cut_short_by_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["recipes", "keys"]) == 0
    err = capsys.readouterr().err
    assert err == "warning: the output was cut short: No space left on device\n"


def test_a_record_on_a_full_disk_has_a_gap_and_no_torn_line(monkeypatch, tmp_path, capsys):
    full = []

    def point(name):
        if full and name == "write:run.jsonl":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "fault_point", point)
    with Tracker(tmp_path, console="none") as tracker:
        tracker.event("step", 1)
        full.append(True)
        tracker.event("step", 2)
        tracker.event("step", 3)
        full.clear()
        tracker.event("step", 4)
    assert [event["step"] for event in read_events(tmp_path / "run.jsonl")] == [1, 4]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "run.jsonl: cannot write: No space left on device; the run goes on" in err


def test_a_display_that_fails_is_left_out(tmp_path):
    class Broken(io.StringIO):
        def write(self, text):
            raise RuntimeError("no display")

    console = Console(file=Broken(), force_terminal=True)
    with Tracker(tmp_path, console=console) as tracker:
        tracker.progress("forget", total=2)
        tracker.event("step", 1, score_loss=1.0)
        tracker.tick(2)
        tracker.say("x")
        tracker.progress("forget", total=2)
    assert [event["step"] for event in read_events(tmp_path / "run.jsonl")] == [1]


def test_a_line_written_by_half_is_taken_back(tmp_path, monkeypatch):
    with Tracker(tmp_path, console="none") as tracker:
        tracker.event("step", 1)

        class Half:
            def __init__(self, file):
                self.file = file

            def write(self, line):
                return self.file.write(line[: len(line) // 2])

            def __getattr__(self, name):
                return getattr(self.file, name)

        lines = tracker._file
        whole, lines._file = lines._file, Half(lines._file)
        tracker.event("step", 2)
        lines._file = whole
        tracker.event("step", 3)
    assert [event["step"] for event in read_events(tmp_path / "run.jsonl")] == [1, 3]


def test_real_processes_with_pipes_that_close():
    """`| head`, `>&-`, an ASCII terminal and no home: nothing on stderr, as the shell sees it."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    env.pop("HOME", None)
    command = f"{sys.executable} -m pecker_fast recipes keys"
    script = (
        f"set -o pipefail; {command} | {{ read line; exec <&-; sleep 0; }}; echo $?; {command} >&-; echo $?; "
        f"{command} 2>&- | wc -l; echo $?"
    )
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    first, second, lines, last = done.stdout.split()
    assert (first, second, last) == ("0", "0", "0")
    assert int(lines) > 50
