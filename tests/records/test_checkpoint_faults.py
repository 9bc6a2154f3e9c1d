"""A checkpoint is whole or absent: every write, fsync and rename of a save fails once, every file is damaged once."""

import errno
import os
import shutil
from functools import partial

import pytest
import torch
from disk_faults import failing, killed, steps_of
from pecker_kernels import SaliencyMask

from pecker_fast import files
from pecker_fast.engine import TrainState
from pecker_fast.engine.state import start_ema
from pecker_fast.errors import CheckpointError, OutputError
from pecker_fast.forgetting.updates import Dense, adam
from pecker_fast.loading.parts import load_parts
from pecker_fast.records import checkpoint

IDENTITY = {"recipe_sha256": "r", "base_sha256": "b"}


def mask_of(generator):
    return SaliencyMask.random(generator.named_parameters(), density=0.3, seed=0)


@pytest.fixture
def state(tiny_recipe):
    recipe = tiny_recipe()
    parts = load_parts(recipe)
    state = TrainState(
        parts.teacher, parts.score, parts.generator, adam(recipe, parts.score.named_parameters(), 1e-3),
        Dense(recipe, parts.generator.named_parameters(), mask_of(parts.generator)), start_ema(parts.generator, 0.9),
    )  # fmt: skip
    for network, optimizer in (
        (parts.score, state.score_optimizer),
        (parts.generator, state.updates.optimizers["generator"]),
    ):
        for _, p in network.named_parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return state


def save(state, folder, step):
    state.step = step
    return checkpoint.save_checkpoint(state, folder, step, IDENTITY, keep=2)


def hashes(folder):
    return {p.name: files.sha256_file(p) for p in sorted(folder.iterdir())}


def test_every_fault_point_leaves_the_old_or_the_new_checkpoint(state, tmp_path, monkeypatch):
    old = hashes(save(state, tmp_path, 1))
    calls: list[str] = []
    monkeypatch.setattr("pecker_fast.files.writing.fault_point", calls.append)
    new = hashes(save(state, tmp_path / "other", 2))
    assert len(calls) > 15  # a save goes through the hooks at all
    for k in range(len(calls)):
        left = iter(range(len(calls) + 1))

        def fail_at_k(name, left=left, k=k):
            if next(left) == k:
                raise OSError(errno.EIO, "injected")

        monkeypatch.setattr("pecker_fast.files.writing.fault_point", fail_at_k)
        with pytest.raises(OutputError, match="injected"):
            save(state, tmp_path, 2)
        monkeypatch.setattr("pecker_fast.files.writing.fault_point", lambda name: None)
        found = checkpoint.latest_checkpoint(tmp_path, warn=lambda message: pytest.fail(message))
        assert found is not None
        assert hashes(found) == (old if found.name == "step-000001" else new), calls[k]
        for leftover in checkpoint.list_checkpoints(tmp_path)[1:]:
            for file in leftover.iterdir():
                file.unlink()
            leftover.rmdir()


@pytest.mark.parametrize("end", [pytest.param(failing, marks=pytest.mark.slow), killed])
def test_a_disk_that_stays_broken_and_a_process_that_dies(state, tmp_path, monkeypatch, end):
    """The old or the new checkpoint, and after the next save nothing but checkpoints."""
    old, new = (hashes(save(state, tmp_path / f"{step}", step)) for step in (1, 3))
    steps = steps_of(lambda: save(state, tmp_path / "1", 2), monkeypatch)
    assert {name.partition(":")[0] for name in steps} >= {"mkdir", "write", "fsync", "replace"}
    for at in range(len(steps)):
        run = tmp_path / f"at-{at}"
        shutil.copytree(tmp_path / "1" / "checkpoints" / "step-000001", run / "checkpoints" / "step-000001")
        end(partial(save, state, run, 3), at, monkeypatch)
        found = checkpoint.latest_checkpoint(run, warn=lambda message: pytest.fail(message))
        assert hashes(found) == (old if found.name == "step-000001" else new), steps[at]
        save(state, run, 4)
        assert len(list((run / "checkpoints").iterdir())) == 2, steps[at]


def test_no_space_is_one_clear_line_and_the_old_checkpoint_stays(state, tmp_path, monkeypatch):
    old = hashes(save(state, tmp_path, 1))

    def full(name):
        if name.startswith("write:score"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pecker_fast.files.writing.fault_point", full)
    with pytest.raises(OutputError, match=r"No space left.*free some space"):
        save(state, tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert hashes(tmp_path / "checkpoints" / "step-000001") == old


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "swap"])
def test_damage_to_any_file_is_seen(state, tmp_path, damage):
    names = sorted(p.name for p in save(state, tmp_path / "names", 1).iterdir())
    for i, name in enumerate(n for n in names if n != "manifest.json"):
        folder = save(state, tmp_path / str(i), 1)
        path = folder / name
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) * 2 // 3] ^= 1 << (i % 8)
            path.write_bytes(data)
        elif damage == "truncate":
            path.write_bytes(data[:-1])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "remove":
            path.unlink()
        else:
            other = folder / next(n for n in names if n not in (name, "manifest.json"))
            path.write_bytes(other.read_bytes())
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load_checkpoint(state, folder, IDENTITY)


def test_round_trip_restores_every_tensor_and_counter(state, tmp_path):
    state.images, state.flops, state.flops_per_iteration = 128, 5e9, {"forget": 2.5e9}
    folder = save(state, tmp_path, 7)
    want = {k: v.clone() for k, v in state.generator.unet.state_dict().items()}
    moment = state.updates.optimizers["generator"].state_dict()["state"][0]["exp_avg_sq"].clone()
    with torch.no_grad():
        for p in state.generator.unet.parameters():
            p.zero_()
    state.ema["conv_in.weight"].zero_()
    state.updates.optimizers["generator"].state_dict()["state"][0]["exp_avg_sq"].zero_()
    state.step = state.images = 0
    checkpoint.load_checkpoint(state, folder, IDENTITY)
    assert all(torch.equal(v, want[k]) for k, v in state.generator.unet.state_dict().items())
    assert torch.equal(state.updates.optimizers["generator"].state_dict()["state"][0]["exp_avg_sq"], moment)
    assert float(state.ema["conv_in.weight"].abs().sum()) > 0
    assert (state.step, state.images, state.flops_per_iteration) == (7, 128, {"forget": 2.5e9})


def test_other_recipe_or_base_is_refused(state, tmp_path):
    folder = save(state, tmp_path, 1)
    for key, match in (("recipe_sha256", "another recipe"), ("base_sha256", "another base model")):
        with pytest.raises(CheckpointError, match=match):
            checkpoint.load_checkpoint(state, folder, {**IDENTITY, key: "x"})
