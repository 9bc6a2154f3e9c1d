"""Runs and exports whose disk fails, fills up or is left by the process at any of their steps: one line, nothing lost."""

import errno
import shutil
from functools import partial

import pytest
from disk_faults import Fault, steps_of
from least_runs import bare, final_files, finished_run, left_overs, replace_by
from limits import HUNG_S
from processes import pecker_fast

from pecker_fast import cli
from pecker_fast.files import writing
from pecker_fast.records import checkpoint

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
SOME = {"train": 3}  # of the steps of a run, in make test, of other verbs two; all of them in make test-all
VERBS = {  # what is done to a finished run
    "wipe": ["resume=never"],
    "export": ["export"],
    "report": ["report"],
    "sample": ["sample"],
    "keep": ["evaluate", "--keep", "--samples", "4"],
    "delta": ["export", "--format", "delta"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe, and a finished run of it."""
    return finished_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def no_books(monkeypatch):
    replace_by(monkeypatch.setattr)


def meets(fault):
    """What a process does first."""
    bare()
    fault()


def command(verb, recipe, run):
    words = VERBS.get(verb, [])
    if verb in ("train", "wipe"):
        return ["train", str(recipe), f"output={run}", "--quiet", *words]
    return [words[0], str(run), *words[1:]]


def count_steps(arguments, monkeypatch):
    return len(steps_of(lambda: cli.main(arguments), monkeypatch))


def chosen(verb, count, every):
    """All steps, or some of them from the first to the last."""
    some = SOME.get(verb, 2)
    return range(count) if every else sorted({round(i * (count - 1) / (some - 1)) for i in range(some)})


def begun(verb, source, run):
    """What the command finds: nothing, or a copy of the finished run."""
    if verb != "train":
        shutil.copytree(source, run)


def goes_on(arguments, run, want, monkeypatch, capsys):
    """With the disk as it should be, the same command does what it was asked, and the run is what it would have been."""
    monkeypatch.setattr(writing, "fault_point", lambda name: None)
    (run / "delta.safetensors").unlink(missing_ok=True)  # it may be whole, and is never overwritten
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert final_files(run) == want
    assert left_overs(run) == []


def fails(verb, whole, tmp_path, monkeypatch, capsys, every):
    recipe, source = whole
    want = final_files(source)
    begun(verb, source, tmp_path / "count")
    steps = count_steps(command(verb, recipe, tmp_path / "count"), monkeypatch)
    assert steps > 2
    for at in chosen(verb, steps, every):
        for error in ERRORS if every else (ERRORS[at % 3],):
            run = tmp_path / f"{at}-{error}"
            begun(verb, source, run)
            arguments = command(verb, recipe, run)
            capsys.readouterr()
            with monkeypatch.context() as patch:
                patch.setattr(writing, "fault_point", lambda name: None)
                Fault(at, error, steps=1 if at % 2 else 1 << 30)()
                code = cli.main(arguments)
            told = capsys.readouterr().err.splitlines()
            assert code in (0, 2), (at, told)
            assert len([line for line in told if line.startswith("error: ")]) == (code == 2), (at, told)
            assert not any("internal" in line or "Traceback" in line for line in told), (at, told)
            for folder in checkpoint.list_checkpoints(run):
                checkpoint.verify_checkpoint(folder)
            goes_on(arguments, run, want, monkeypatch, capsys)
            shutil.rmtree(run)


@pytest.mark.parametrize("verb", ["train", *VERBS])
def test_a_disk_that_fails(verb, whole, tmp_path, monkeypatch, capsys):
    fails(verb, whole, tmp_path, monkeypatch, capsys, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", *VERBS])
def test_a_disk_that_fails_at_every_step(verb, whole, tmp_path, monkeypatch, capsys):
    fails(verb, whole, tmp_path, monkeypatch, capsys, every=True)


def dies(verb, whole, tmp_path, monkeypatch, capsys, every):
    recipe, source = whole
    want = final_files(source)
    begun(verb, source, tmp_path / "count")
    steps = count_steps(command(verb, recipe, tmp_path / "count"), monkeypatch)
    for at in chosen(verb, steps, every):
        run = tmp_path / f"{at}"
        begun(verb, source, run)
        arguments = command(verb, recipe, run)
        process = pecker_fast(*arguments, log=tmp_path / "log", first=partial(meets, Fault(at)))
        assert process.wait(HUNG_S) == 9, (tmp_path / "log").read_text()
        goes_on(arguments, run, want, monkeypatch, capsys)
        shutil.rmtree(run)


@pytest.mark.parametrize("verb", ["train"])  # the others' steps are in tests/records/test_wiping.py and tests/files
def test_a_process_that_dies(verb, whole, tmp_path, monkeypatch, capsys):
    dies(verb, whole, tmp_path, monkeypatch, capsys, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", *VERBS])
def test_a_process_that_dies_at_every_step(verb, whole, tmp_path, monkeypatch, capsys):
    dies(verb, whole, tmp_path, monkeypatch, capsys, every=True)
