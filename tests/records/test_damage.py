"""Damage to a checkpoint: a bit of any file, whole files, the step. It is told, and the older whole checkpoint is used."""

import json
import random
import shutil

import pytest
from small_runs import flipped, small_run

from pecker_fast import files
from pecker_fast.errors import CheckpointError
from pecker_fast.records import checkpoint, latest_checkpoint, read_checkpoint_stage
from pecker_fast.records.manifest import read_manifest, verify_checkpoint


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    return small_run(tiny_model, tmp_path_factory.mktemp("damage") / "run", evaluate={"every": 0, "final": 0})


@pytest.fixture(scope="module")
def points(run):
    older, newest = checkpoint.list_checkpoints(run)
    return older, newest


def identity_of(folder):
    return {key: read_manifest(folder)[key] for key in ("recipe_sha256", "base_sha256", "start_sha256")}


def passed_over(run, identity):
    """(name of the checkpoint used, what was said of the others)."""
    said = []
    found = latest_checkpoint(run, said.append, identity, distill_steps=0)
    return found.name, " ".join(said)


def flips(folder, each, seed=0):
    """(file, bit) of `each` bits of every file, the first and the last of it always among them."""
    rng = random.Random(seed)
    for path in sorted(folder.iterdir()):
        bits = 8 * path.stat().st_size
        yield from ((path, bit) for bit in {0, bits - 1, *(rng.randrange(bits) for _ in range(each - 2))})


@pytest.mark.parametrize("each", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_and_the_older_checkpoint_used(run, points, each):
    older, newest = points
    identity, cases = identity_of(newest), list(flips(newest, each))
    assert len(cases) >= 7 * each - 7
    assert {path.name for path, _ in cases} >= {files.MANIFEST, "state.json", "mask.safetensors", "ema.safetensors"}
    for path, bit in cases:
        with flipped(path, bit):
            name, said = passed_over(run, identity)
        assert name == older.name, (path.name, bit)
        assert path.name in said, (path.name, bit, said)
    assert passed_over(run, identity) == (newest.name, "")
    print(f"flipped bits: {len(cases)} of {len(cases)} found")


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_every_bit_of_the_manifest_is_its_own(points, tmp_path, every):
    """Damage of the manifest is told as that, and never as another recipe or a damaged file beside it."""
    path = tmp_path / files.MANIFEST
    shutil.copyfile(points[1] / files.MANIFEST, path)
    bits = range(0, 8 * path.stat().st_size, every)
    for bit in bits:
        with (
            flipped(path, bit),
            pytest.raises(CheckpointError, match=r"manifest\.json: .*(damaged|not UTF-8|not text)"),
        ):
            read_manifest(tmp_path)
    read_manifest(tmp_path)
    print(f"flipped bits of the manifest: {len(bits)} of {len(bits)} told as its damage")


def resealed(folder, **changes):
    """A manifest forged with a checksum of its own."""
    content = json.loads((folder / files.MANIFEST).read_text())
    del content[files.SEAL]
    files.write_sealed(folder / files.MANIFEST, {**content, **changes})


def relisted(folder, *left_out):
    resealed(folder, files=files.entries_of(folder, (files.MANIFEST, *left_out)))


def counters(folder, **changes):
    state = json.loads((folder / "state.json").read_text())
    state["counters"] |= changes
    files.write_json(folder / "state.json", state)
    relisted(folder)


def take(source, target):
    target.write_bytes(source.read_bytes())


def folder_for(path):
    path.unlink()
    path.mkdir()


def of_version_1(folder, **changes):
    """As releases before wrote it, forged."""
    content = json.loads((folder / files.MANIFEST).read_text())
    old = {
        k: content[k] for k in ("format", "version", "step", "recipe_sha256", "base_sha256", "start_sha256", "files")
    }
    files.write_json(folder / files.MANIFEST, {**old, "version": 1, **changes})


OF_A_FILE = {
    "truncated": lambda path, older, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path, older, other: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path, older, other: path.write_bytes(b""),
    "missing": lambda path, older, other: path.unlink(),
    "swapped": lambda path, older, other: take(other, path),
    "of the older checkpoint": lambda path, older, other: take(older, path),
    "a folder": lambda path, older, other: folder_for(path),
}
OF_THE_WHOLE = {
    "renamed to a later step": (lambda f: f.rename(f.with_name("step-000009")), "step-000009/manifest.json: wrong step"),
    "another step, resealed": (lambda f: resealed(f, step=9), "step-000004/manifest.json: wrong step"),
    "another step everywhere but in state.json": (
        lambda f: (resealed(f, step=9), f.rename(f.with_name("step-000009"))), "state.json: wrong step",
    ),
    "counters of an earlier step": (lambda f: counters(f, step=2), "state.json: wrong step"),
    "counters of a later step": (lambda f: counters(f, step=5), "state.json: wrong step"),
    "counters of another stage": (lambda f: counters(f, stage="distill", step=2), "state.json: wrong step"),
    "counters of no stage": (lambda f: counters(f, stage="mask"), "state.json: damaged"),
    "a step that is no number": (lambda f: counters(f, step="4"), "state.json: damaged"),
    "a shard more": (lambda f: take(f / "ema.safetensors", f / "shard-00001-of-00002.safetensors"), "shard-00001-of"),
    "a mask that is not listed": (
        lambda f: relisted(f, "mask.safetensors"),
        "mask.safetensors: not of this checkpoint",
    ),
    "nothing listed": (lambda f: resealed(f, files={}), "manifest.json: lists no files"),
    "a file from elsewhere listed": (
        lambda f: resealed(f, files={"../x": {"sha256": "0" * 64, "bytes": 1}}), "manifest.json: damaged",
    ),
    "sizes that are none": (
        lambda f: resealed(f, files={"state.json": {"sha256": "0" * 64, "bytes": True}}), "manifest.json: damaged",
    ),
    "no step": (lambda f: resealed(f, step=None), "not a checkpoint manifest"),
    "of a later release": (lambda f: resealed(f, version=3), "checkpoint version 3"),
    "another recipe's": (lambda f: resealed(f, recipe_sha256="0" * 64), "belongs to another recipe"),
    "version 1 with a wrong step": (lambda f: of_version_1(f, step=9), "step-000004/manifest.json: wrong step"),
    "version 1 with a key more": (lambda f: of_version_1(f, machine={}), "manifest.json: damaged"),
    "not a mapping": (lambda f: (f / files.MANIFEST).write_text("[]"), "manifest.json: damaged"),
}  # fmt: skip


def test_structural_damage_is_told_by_name(run, points, tmp_path):
    older, newest = points
    identity, names = identity_of(newest), sorted(path.name for path in newest.iterdir())
    cases = [(what, name) for what in OF_A_FILE for name in names]
    cases.remove(("of the older checkpoint", "mask.safetensors"))  # which is the same mask
    for what, name in cases:
        copy = shutil.copytree(run / "checkpoints", tmp_path / f"{what} {name}" / "checkpoints")
        other = next(n for n in names if n not in (name, files.MANIFEST))
        OF_A_FILE[what](copy / newest.name / name, older / name, newest / other)
        found, said = passed_over(copy.parent, identity)
        assert found == older.name, (what, name)
        assert name in said, (what, name, said)
        shutil.rmtree(copy.parent)
    for what, (damage, match) in OF_THE_WHOLE.items():
        copy = shutil.copytree(run / "checkpoints", tmp_path / what / "checkpoints")
        damage(copy / newest.name)
        found, said = passed_over(copy.parent, identity)
        assert found == older.name, what
        assert match in said, (what, said)
    print(f"structural damage: {len(cases) + len(OF_THE_WHOLE)} cases told")
    assert len(cases) + len(OF_THE_WHOLE) >= 40


def test_a_checkpoint_of_a_distilled_run_is_of_its_step(points, tmp_path):
    """Four iterations after two of distillation are step 6."""
    folder = shutil.copytree(points[1], tmp_path / "step-000006")
    resealed(folder, step=6)
    verify_checkpoint(folder)
    verify_checkpoint(folder, distill_steps=2)
    with pytest.raises(CheckpointError, match="wrong step"):
        verify_checkpoint(folder, distill_steps=0)
    assert read_checkpoint_stage(folder)[0] == "forget"


def test_where_no_checkpoint_is_whole_it_is_refused(run, tmp_path):
    copy = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    for folder in copy.iterdir():
        (folder / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(.*step-000004/ema.safetensors: missing"):
        latest_checkpoint(tmp_path, print)
