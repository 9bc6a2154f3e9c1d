"""No pickle is opened, under any name: the canary that each would plant is never seen."""

import contextlib
import io
import json
import os
import pickle

import pytest
import torch

from pecker_fast import files
from pecker_fast.conditions import read_prompts
from pecker_fast.errors import PeckerError
from pecker_fast.recipe import load_recipe

NAMES = ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.safetensors", "model", "model.json"]


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mknod, (self.path,)


def pickles(canary):
    """The same payload in the containers that weights come in."""
    kinds = {f"protocol {protocol}": pickle.dumps(canary, protocol) for protocol in range(6)}
    for name, zipped in (("torch zip", True), ("torch legacy", False)):
        buffer = io.BytesIO()
        torch.save({"weight": canary}, buffer, _use_new_zipfile_serialization=zipped)
        kinds[name] = buffer.getvalue()
    return kinds


KINDS = ["protocol 0", "protocol 2", "protocol 4", "protocol 5", "torch zip", "torch legacy"]


def test_the_canary_works(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_reader_refuses_it(tmp_path, name, kind):
    canary = tmp_path / "canary"
    path = tmp_path / name
    path.write_bytes(pickles(Canary(canary))[kind])
    with pytest.raises(PeckerError) as caught:
        files.read_tensors(path)
    message = str(caught.value)
    assert name in message
    if kind not in ("protocol 0",) or path.suffix in files.PICKLE_SUFFIXES:
        assert "pickle" in message
    for read in (files.read_json, load_recipe, files.check_model_folder):
        with pytest.raises(PeckerError):
            read(path)
    assert not canary.exists()


ENDINGS = [
    *(
        "bin",
        "BIN",
        "pt",
        "pth",
        "ckpt",
        "pkl",
        "pickle",
        "joblib",
        "npy",
        "npz",
        "h5",
        "th",
        "data",
        "mar",
        "tar",
        "zip",
    ),
    *(
        "safetensors",
        "SAFETENSORS",
        "safetensors.bin",
        "json",
        "JSON",
        "txt",
        "md",
        "yaml",
        "csv",
        "tsv",
        "index.json",
        "model",
    ),
    *("onnx", "gguf", "msgpack", "ot", "PY", "py", "pyc", "so", "", "bak", "tmp", "old", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_of_any_ending_is_opened_by_nobody(tmp_path, ending, kind):
    """By any reader of files, and by all that look at a folder which has it in each of its parts."""
    canary = tmp_path / "canary"
    model = tmp_path / "m"
    payload = pickles(Canary(canary))[kind]
    for part in files.PARTS:
        (model / part).mkdir(parents=True, exist_ok=True)
        (model / part / f"model.{ending}").write_bytes(payload)
        (model / part / f"diffusion_pytorch_model.{ending}").write_bytes(payload)
    (model / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    path = model / "unet" / f"diffusion_pytorch_model.{ending}"
    for read in (files.read_tensors, files.read_json, load_recipe, files.read_weights):
        with pytest.raises(PeckerError):
            read(path)
    for read in (files.read_text, read_prompts):
        with contextlib.suppress(PeckerError):  # the oldest protocol is plain text, and read as such
            read(path)
    with pytest.raises(PeckerError):
        files.check_model_folder(model)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt", "pytorch_model.pt"])
def test_a_folder_with_pickles_alone_is_refused_with_the_remedy(tmp_path, name):
    unet = tmp_path / "m" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (unet / name).write_bytes(pickles(Canary(tmp_path / "canary"))["torch zip"])
    with pytest.raises(PeckerError, match=r"holds only pickle weights; .*convert them to safetensors"):
        files.check_model_folder(tmp_path / "m")
    assert not (tmp_path / "canary").exists()


def test_a_pickle_named_safetensors_inside_a_model_is_refused(tmp_path):
    unet = tmp_path / "m" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (unet / files.WEIGHTS_NAME).write_bytes(pickles(Canary(tmp_path / "canary"))["torch zip"])
    with pytest.raises(PeckerError, match="holds a pickle, whatever its name"):
        files.check_model_folder(tmp_path / "m")
    with pytest.raises(PeckerError, match="pickle"):
        files.read_weights(unet)
    assert not (tmp_path / "canary").exists()


def test_a_real_header_that_begins_like_a_pickle_is_read(tmp_path):
    """A header of 0x480 bytes starts the file with 80 04, as protocol 4 does."""
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x480)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    assert path.read_bytes()[:2] == b"\x80\x04"
    assert files.read_tensors(path)[0]["a"].tolist() == [7]
