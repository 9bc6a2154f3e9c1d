"""What goes from a model's folder into an export: the files that stock readers know, by name, opened once inside the model."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_text_models import tiny_pipeline

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.export.delta import apply_to_folder, delta_of_folders
from pecker_fast.networks import copy_part

PARTS = ("vae", "text_encoder", "tokenizer")
KNOWN = {
    "vae": {"config.json", files.WEIGHTS_NAME},
    "text_encoder": {"config.json", files.TEXT_WEIGHTS_NAME},
    "tokenizer": {"tokenizer.json", "tokenizer_config.json"},
}
SECRET = b'{"canary": "nobody else may see this"}'
# what people, tools and attackers leave in a folder: pickles under any name, code, notes, keys, other copies
ODD = (
    *(
        "pytorch_model.bin",
        "model.BIN",
        "weights.pt",
        "x.pth",
        "x.ckpt",
        "a.pkl",
        "a.pickle",
        "a.joblib",
        "a.npz",
        "a.npy",
    ),
    *(
        "model.h5",
        "model.msgpack",
        "model.onnx",
        "model.gguf",
        "x.PY",
        "modeling.py",
        "setup.sh",
        "a.so",
        "key.pem",
        "id_rsa",
    ),
    *(
        ".env",
        ".netrc",
        "._config.json",
        "credentials.json",
        "notes.txt",
        "NOTES.md",
        "spiece.model",
        "chat_template.jinja",
    ),
    *(
        "config.json.bak",
        "config.JSON",
        "config (copy).json",
        "diffusion_pytorch_model.ema.safetensors",
        "other.safetensors",
    ),
    *(
        "model.safetensors.orig",
        "training_args.bin",
        "optimizer.pt",
        "tokenizer.4.0.0.json",
        "preprocessor_config.json",
    ),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("plain") / "model", "sd1")


@pytest.fixture
def model(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model", copy_function=os.link)


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.json").write_bytes(SECRET)
    return tmp_path / "private"


def copied(model: Path, target: Path) -> dict[str, set[str]]:
    """Names of what is copied, by part; nothing of it is private, a link or a pickle."""
    for part in PARTS:
        copy_part(model / part, target / part)
    found = [path for path in target.rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() or SECRET in path.read_bytes() or b"canary" in path.read_bytes() for path in found)
    return {
        part: {str(p.relative_to(target / part)) for p in found if p.is_relative_to(target / part)} for part in PARTS
    }


def test_of_what_lies_in_a_part_only_known_files_are_copied(model, tmp_path):
    for part in PARTS:
        for name in ODD:
            (model / part / name).write_bytes(SECRET if name.endswith(("json", "txt")) else pickle.dumps({"canary": 1}))
        inside = model / part / "additional_chat_templates"
        inside.mkdir()
        (inside / "a.jinja").write_bytes(SECRET)
    assert copied(model, tmp_path / "copy") == KNOWN
    for part in ("vae", "tokenizer"):  # a text encoder is written again, under names that every transformers reads
        for name in KNOWN[part]:
            assert (tmp_path / "copy" / part / name).read_bytes() == (model / part / name).read_bytes()


def test_links_below_a_part_are_not_followed(model, secret, tmp_path):
    for part in PARTS:
        (model / part / "more").mkdir()
        (model / part / "more" / "key.json").symlink_to(secret / "key.json")
        (model / part / "more" / "all").symlink_to(secret)
    assert copied(model, tmp_path / "copy") == KNOWN


LINKED = [
    *(("vae", name) for name in ("config.json", files.WEIGHTS_NAME)),
    *(("text_encoder", name) for name in ("config.json", files.TEXT_WEIGHTS_NAME)),
    *(("tokenizer", name) for name in files.SMALL_FILES["tokenizer"]),
]


@pytest.mark.parametrize(("part", "name"), LINKED)
def test_a_known_name_that_leads_out_of_the_model_is_refused(model, secret, tmp_path, part, name):
    file = model / part / name
    target = secret / "key.json"
    if file.exists():
        target = Path(shutil.copy(file, secret / name))  # sound in itself, and not the model's
    file.unlink(missing_ok=True)
    file.symlink_to(target)
    with pytest.raises(ModelError, match="a link that leaves the model folder"):
        copy_part(model / part, tmp_path / "copy" / part)


@pytest.mark.parametrize("name", ["config.json", files.WEIGHTS_NAME])
def test_a_file_exchanged_after_it_was_looked_at_is_not_copied(model, secret, tmp_path, monkeypatch, name):
    """Between the look and the opening a link takes its place, and goes again before anybody looks a second time."""
    file, real = model / "vae" / name, os.open

    def late(path, *rest):
        if Path(path) != file:
            return real(path, *rest)
        file.rename(file.with_suffix(".kept"))
        file.symlink_to(secret / "key.json")
        opened = real(path, *rest)
        file.unlink()
        file.with_suffix(".kept").rename(file)
        return opened

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(ModelError, match="was changed while it was read"):
        copy_part(model / "vae", tmp_path / "copy" / "vae")


def test_what_a_hub_model_links_to_is_its_own(model, secret, tmp_path):
    """CACHE/models--NAME/snapshots/REVISION links to the model's blobs, and those to a store for all models."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    blobs, store = cache / "models--owner--name" / "blobs", cache / "blobs" / "ab"
    blobs.mkdir()
    store.mkdir(parents=True)
    config, weights = snapshot / "vae" / "config.json", snapshot / "vae" / files.WEIGHTS_NAME
    config.rename(blobs / "c0ffee")
    config.symlink_to("../../../blobs/c0ffee")
    weights.rename(store / ("ab" + "0" * 62))
    (blobs / "feed").symlink_to(f"../../blobs/ab/ab{'0' * 62}")
    weights.symlink_to("../../../blobs/feed")
    assert files.check_model_folder(snapshot) == snapshot / "unet"
    copy_part(snapshot / "vae", tmp_path / "copy" / "vae")
    assert len(list((tmp_path / "copy" / "vae").iterdir())) == 2
    shutil.copy(store / ("ab" + "0" * 62), cache / "blobs" / "mine.safetensors")
    for way in ("../../blobs/mine.safetensors", "../../models--other/x", str(secret / "key.json")):
        (blobs / "feed").unlink()
        (blobs / "feed").symlink_to(way)
        with pytest.raises(ModelError, match=r"leaves the model folder|leads nowhere"):
            copy_part(snapshot / "vae", tmp_path / Path(way).name / "vae")


def test_shards_are_files_of_the_folder(model, secret, tmp_path):
    part = model / "vae"
    stored = files.read_tensors(part / files.WEIGHTS_NAME)[0]
    index = part / f"{files.WEIGHTS_NAME}.index.json"
    first, *_ = sorted(stored)

    def sharded(**names):
        for name, tensors in names.items():
            files.write_tensors(part / f"{name}.safetensors", tensors)
        index.write_text(json.dumps({"weight_map": {f"t{i}": f"{name}.safetensors" for i, name in enumerate(names)}}))

    (part / files.WEIGHTS_NAME).unlink()
    sharded(a={first: stored[first]}, b={name: tensor for name, tensor in stored.items() if name != first})
    copy_part(part, tmp_path / "copy" / "vae")
    assert {p.name for p in (tmp_path / "copy" / "vae").iterdir()} == {
        *("config.json", index.name, "a.safetensors", "b.safetensors")
    }
    sharded(a={first: stored[first] + 1}, b=stored)
    with pytest.raises(ModelError, match=f"tensor {first} is in two files"):
        files.read_weights(part)
    shutil.copy(part / "b.safetensors", secret / "b.safetensors")
    (part / "._b.safetensors").symlink_to(secret / "b.safetensors")  # of a Mac's archiver, which nobody looks at
    index.write_text(json.dumps({"weight_map": {first: "._b.safetensors"}}))
    with pytest.raises(ModelError, match="it is not followed"):
        files.read_weights(part)


def test_the_copy_is_what_is_checked(model, tmp_path, monkeypatch):
    """Weights that turn into others between the look and the copy are found in the copy."""
    weights, real = model / "vae" / files.WEIGHTS_NAME, files.copy_file

    def exchanged(source, target, tree):
        real(source, target, tree)
        if source == weights:
            tensors = {name: tensor * torch.nan for name, tensor in files.read_tensors(target)[0].items()}
            files.write_tensors(target, tensors)

    monkeypatch.setattr(files, "copy_file", exchanged)
    with pytest.raises(ModelError, match="NaN, infinity or absurd numbers"):
        copy_part(model / "vae", tmp_path / "copy" / "vae")


BASES = {
    "vae/config.json": {"scaling_factor": float("nan")},
    "text_encoder/config.json": {"_attn_implementation": "someone/kernels"},
    "tokenizer/tokenizer_config.json": {"gguf_file": "x"},
    "scheduler/scheduler_config.json": {"num_train_timesteps": 10**9},
    "unet/config.json": {"norm_eps": float("inf")},
    "model_index.json": {"vae": 5},
}


@pytest.mark.parametrize("name", BASES)
def test_the_base_of_a_delta_is_looked_at_as_a_model_is(model, tmp_path, name):
    delta_of_folders(model, model, tmp_path / "delta.safetensors")
    config = json.loads((model / name).read_text())
    (model / name).unlink()
    (model / name).write_text(json.dumps({**config, **BASES[name]}))
    with pytest.raises(ModelError, match=f"{next(iter(BASES[name]))} is "):
        apply_to_folder(tmp_path / "delta.safetensors", model, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_delta_is_applied_without_what_lies_about_in_the_base(model, plain, secret, tmp_path):
    result = shutil.copytree(plain, tmp_path / "result")
    unet = files.read_weights(result / "unet")
    unet["conv_in.bias"] = unet["conv_in.bias"] + 1
    files.write_tensors(result / "unet" / files.WEIGHTS_NAME, unet)
    delta = tmp_path / "delta.safetensors"
    delta_of_folders(model, result, delta)
    for folder in (model, *(model / part for part in (*PARTS, "unet", "scheduler"))):
        for name in ODD:
            (folder / name).write_bytes(SECRET)
    (model / "LICENSE").write_text("as it is")
    output = apply_to_folder(delta, model, tmp_path / "output")
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    wanted = {f"{part}/{name}" for part, names in KNOWN.items() for name in names}
    assert found - wanted == {
        *("LICENSE", "model_index.json", "unet/config.json", f"unet/{files.WEIGHTS_NAME}"),
        "scheduler/scheduler_config.json",
    }
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(secret / "key.json")
    with pytest.raises(ModelError, match="leaves the model folder"):
        apply_to_folder(delta, model, tmp_path / "again")
    assert not (tmp_path / "again").exists()
