"""A judge's folder by every way in: by itself, as judge of words, as detector. It is foreign, as any model is."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pecker_fast.errors import PeckerError
from pecker_fast.evaluate import load_detector, load_second_judge
from pecker_fast.evaluate.classifiers import PatchMixer, SmallClassifier
from pecker_fast.evaluate.judge import Reference, load_judge, save_judge
from pecker_fast.evaluate.words import load_word_judge, save_word_judge


def edit(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change(path: Path, how) -> None:
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def link_out(name):
    def hurt(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}-{folder.name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return hurt


def refused(load, *arguments, about: str) -> None:
    with pytest.raises(PeckerError) as caught:
        load(*arguments)
    assert about in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 600


JUDGES = {
    "pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(["x" * 20])), "pickle"),
    "pickled config": (lambda f: (f / "config.json").write_bytes(pickle.dumps({})), "not UTF-8"),
    "config links out": (link_out("config.json"), "leaves the model folder"),
    "weights link out": (link_out("model.safetensors"), "leaves the model folder"),
    "code": (lambda f: edit(f / "config.json", auto_map={"a": "b"}), "auto_map names custom code"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "another type": (lambda f: edit(f / "config.json", type="Evil"), "type is 'Evil'"),
    "a thousand million features": (lambda f: edit(f / "config.json", features=10**9), "features is 1000000000"),
    "absurd width": (lambda f: edit(f / "config.json", width=65536), "must be (65536"),
    "accuracy above one": (lambda f: edit(f / "config.json", info={"held_out_accuracy": 7}), "held_out_accuracy is 7"),
    "accuracy is NaN": (
        lambda f: edit(f / "config.json", info={"held_out_accuracy": float("nan")}),
        "held_out_accuracy",
    ),
    "more weights": (
        lambda f: change(f / "model.safetensors", lambda t: t.update(x=torch.ones(1))),
        "unexpected tensor x",
    ),
    "many words": (
        lambda f: edit(f / "config.json", attributes={"a": [f"w{i}" for i in range(60_000)]}),
        "at most 2,000 words",
    ),
    "a pipe": (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "neither a file nor a folder"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_by_every_way_in(tmp_path, name):
    hurt, about = JUDGES[name]
    network = SmallClassifier(3, 8, 4, 4, 6)
    save_judge(
        tmp_path / "classes", network, Reference(torch.rand(3, 6), torch.tensor([0, 1, 3])), {"held_out_accuracy": 0.5}
    )
    save_word_judge(tmp_path / "words", network, {"shape": ["circle", "square"], "tone": ["red", "blue"]})
    save_judge(tmp_path / "second_judge", PatchMixer(3, 8, 4, 4, 6), None, {"held_out_accuracy": 0.5})
    ways = [
        (load_judge, "classes", ""),
        (load_detector, "classes", ":1"),
        (load_word_judge, "words", ""),
        (load_detector, "words", ":red"),
        (lambda folder: load_second_judge(Path(folder).parent), "second_judge", ""),
    ]
    for load, kind, _ in ways[::2]:
        assert load(tmp_path / kind)
        hurt(tmp_path / kind)
    for load, kind, mark in ways:
        refused(load, f"{tmp_path / kind}{mark}", about=about)


REFERENCES = {
    "labels that are flags": lambda held: held.update(labels=held["labels"].bool()),
    "features of eight bits": lambda held: held.update(features=held["features"].to(torch.int8)),
    "complex features": lambda held: held.update(features=held["features"].to(torch.complex64)),
    "more": lambda held: held.update(more=torch.ones(1)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_features_of_real_images_are_numbers(tmp_path, name):
    save_judge(tmp_path, SmallClassifier(3, 8, 4, 4, 6), Reference(torch.rand(3, 6), torch.tensor([0, 1, 3])), {})
    change(tmp_path / "reference.safetensors", REFERENCES[name])
    refused(load_judge, tmp_path, about="reference")
