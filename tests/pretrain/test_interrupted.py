"""A model folder in the making: whatever step of it fails or is the last of a killed process, the same command goes on."""

import contextlib
import errno
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from disk_faults import Fault, failing, killed, steps_of
from least_runs import bare, left_overs, replace_by
from limits import HUNG_S
from processes import context

from pecker_fast import files
from pecker_fast.data.datasets import Dataset
from pecker_fast.errors import OutputError
from pecker_fast.files import writing
from pecker_fast.pretrain import SETTINGS, pretrain, rounds
from pecker_fast.pretrain import output as folders

LEAST = replace(
    SETTINGS["digits"], steps=2, batch_size=2, channels=(8,), attention_head_dim=8, judge_steps=2, judge_width=4,
    judge_features=4, samples=8, sampler_steps=1, checkpoint_every=1, distill={"batch_size": 2, "checkpoint": {"every": 1}},
)  # fmt: skip
PARTS = [f"{part}/weights" for part in ("generator", "score")]
SOME = 2  # steps of a whole model in make test; all of them in make test-all


def few_pictures(name, path=None, **options):
    return Dataset(
        torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10, 10, name, "all"
    )


def small():
    """From here on data sets of this process are small, and its distillation keeps no books."""
    bare()
    from pecker_fast.data import datasets

    datasets.open_data = few_pictures


def make(folder):
    return pretrain("digits", output=folder, settings=LEAST, distill_steps=1)


def weights(folder):
    return {str(p.relative_to(folder)): files.sha256_file(p) for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture
def least(monkeypatch):
    replace_by(monkeypatch.setattr)
    monkeypatch.setattr("pecker_fast.data.datasets.open_data", few_pictures)


def chosen(count, every):
    return range(count) if every else sorted({round(i * (count - 1) / SOME) for i in range(SOME + 1)})


def fails(tmp_path, monkeypatch, every):
    steps = len(steps_of(lambda: make(tmp_path / "whole"), monkeypatch))
    want = weights(tmp_path / "whole")
    assert {"unet", "judge", "generator", "score"} <= {name.partition("/")[0] for name in want}
    for at in chosen(steps, every):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(writing, "fault_point", lambda name: None)
            Fault(at, (errno.ENOSPC, errno.EIO, errno.EDQUOT)[at % 3], steps=1 if at % 2 else 1 << 30)()
            with contextlib.suppress(OutputError):
                make(folder)
        monkeypatch.setattr(writing, "fault_point", lambda name: None)
        again(folder)
        assert weights(folder) == want, at
        assert left_overs(folder) == []
        shutil.rmtree(folder)


def again(folder):
    """The same command; of a model that had become whole it says so."""
    if (folder / folders.MODEL).is_file() and not (folder / folders.PARTIAL).is_file():
        with pytest.raises(OutputError, match="already holds a model"):
            make(folder)
    else:
        make(folder)
    assert not (folder / folders.PARTIAL).exists()


def test_a_disk_that_fails(least, tmp_path, monkeypatch):
    fails(tmp_path, monkeypatch, every=False)


@pytest.mark.slow
def test_a_disk_that_fails_at_every_step(least, tmp_path, monkeypatch):
    fails(tmp_path, monkeypatch, every=True)


def die(folder, at):
    small()
    Fault(at)()
    make(folder)


def dies(tmp_path, monkeypatch, every):
    steps = len(steps_of(lambda: make(tmp_path / "whole"), monkeypatch))
    for at in chosen(steps, every):
        folder = tmp_path / str(at)
        process = context().Process(target=die, args=(folder, at))
        process.start()
        process.join(HUNG_S)
        assert process.exitcode == 9
        again(folder)
        assert weights(folder) == weights(tmp_path / "whole"), at
        assert left_overs(folder) == []
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_process_that_dies_at_every_step(least, tmp_path, monkeypatch):
    dies(tmp_path, monkeypatch, every=True)


def test_what_a_killed_process_left_goes_whole_models_too(least, tmp_path):
    """In the folder of every part, though the part itself is finished and not written again."""
    files.write_json(tmp_path / folders.PARTIAL, {"name": "x"})
    torn = [
        tmp_path / name for name in (".vae.tmp-0123abcd/x", "unet/.weights.tmp-0123abcd", "judge/.a.gone-0123abcd/x")
    ]
    users = [tmp_path / name for name in ("unet/.notes", ".mine/.weights.tmp-0123abcd.txt")]
    for path in (*torn, *users):
        files.write_text(path, "x")
    with folders.claimed(tmp_path):
        assert not folders.claim_for(tmp_path, {"name": "x"}, "make")
    assert not any(path.exists() for path in torn)
    assert all(path.exists() for path in users)


def test_two_processes_do_not_share_a_folder(tmp_path):
    with folders.claimed(tmp_path / "model"), pytest.raises(OutputError, match="another process is at work in it"):
        make(tmp_path / "model")
    assert left_overs(tmp_path) == []


# -- rounds of distillation, with a stand-in for what each of them does ------------------------------------------------------


def distilled(folder, *, into, steps, seed, keys, dtype, without):
    """Writes what it starts from and its own seed, as a round does."""
    start = files.read_text(into.parent / keys["generator"] / PARTS[0]) if "generator" in keys else "teacher"
    with files.whole_folder(into) as temporary:
        for name in PARTS:
            files.write_text(temporary / name, f"{start} {seed}")


def two_rounds(folder):
    rounds.distil(folder, [{"share": 0.5}, {"share": 0.5}], 10, 0, torch.float16)
    folders.finish(folder)


@pytest.mark.parametrize("end", [pytest.param(failing, marks=pytest.mark.slow), killed])
def test_every_step_of_the_rounds(tmp_path, monkeypatch, end):
    monkeypatch.setattr("pecker_fast.runs.distill", distilled)

    def begun(folder):
        files.write_json(folder / folders.PARTIAL, {})
        return folder

    begun(tmp_path / "count")
    steps = steps_of(lambda: two_rounds(tmp_path / "count"), monkeypatch)
    assert len(steps) > 30
    for at in range(len(steps)):
        folder = begun(tmp_path / str(at))
        end(partial(two_rounds, folder), at, monkeypatch)
        finished = not (folder / folders.PARTIAL).exists()
        assert not finished or (folder / PARTS[1]).is_file()
        if not (folder / PARTS[0]).exists() or any(folder.glob(".distilled-*")):
            two_rounds(folder)
        else:  # cut off in `finish`, which the same command goes on with
            folders.finish(folder)
        assert [files.read_text(folder / name) for name in PARTS] == ["teacher 0 1"] * 2, steps[at]
        assert sorted(p.name for p in folder.iterdir()) == ["generator", "score"], steps[at]
