"""Detectors: what they must return, judge folders as detectors, and the user's own functions."""

import json
import sys
import textwrap

import numpy as np
import pytest
import torch

from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate.classifiers import SmallClassifier
from pecker_fast.evaluate.detector import Detector, load_detector
from pecker_fast.evaluate.judge import save_judge

IMAGES = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def detect(**answer):
    """What a detector makes of `answer`, whose values are functions of the images."""
    return Detector("mine", lambda x: {key: value(x) for key, value in answer.items()}).detect(IMAGES, batch_size=3)


def brightness(x):
    return (x.mean((1, 2, 3)) + 1) / 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Judge folders: "words" (3 shapes, 2 colours), "classes" (4) and "pair" (2), each with the network in it."""
    torch.manual_seed(0)
    made = {}
    for name, count in (("words", 5), ("classes", 4), ("pair", 2)):
        folder, network = tmp_path_factory.mktemp("judges") / name, SmallClassifier(3, 8, count, width=4, features=8)
        save_judge(folder, network, None, {}, dtype=torch.float32)
        made[name] = (folder, network.eval())
    config = made["words"][0] / "config.json"
    attributes = {"shape": ["circle", "square", "star"], "colour": ["red", "blue"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attributes": attributes}))
    return made


def test_all_that_a_detector_says():
    said = detect(score=brightness, faces=lambda x: torch.arange(len(x)), flag=lambda x: brightness(x) > 0.6)
    assert torch.equal(said.score, brightness(IMAGES).double())
    assert said.faces.tolist() == [0, 1, 2, 0, 1, 2, 0]  # batches of 3
    assert torch.equal(said.flag, brightness(IMAGES) > 0.6)


def test_score_alone_flags_from_a_half_on():
    scores = iter([torch.tensor([0.0, 0.5, 0.49]), torch.tensor([1.0, 0.2, 0.7]), torch.tensor([0.5])])
    said = detect(score=lambda x: next(scores))
    assert said.faces is None
    assert said.flag.tolist() == [False, True, False, True, False, True, True]


def test_other_kinds_of_numbers():
    said = detect(
        score=lambda x: brightness(x).numpy(), faces=lambda x: [1] * len(x), flag=lambda x: np.ones(len(x), np.uint8)
    )
    assert said.score.shape == (7,)
    assert said.faces.tolist() == [1] * 7
    assert said.flag.all()


def test_images_come_as_promised_and_stay_as_they_are():
    seen = []

    def greedy(x):
        seen.append((x.dtype, tuple(x.shape), float(x.min()), float(x.max())))
        x.zero_()
        return {"score": torch.zeros(len(x))}

    images = IMAGES.double() * 3
    before = images.clone()
    Detector("mine", greedy).detect(images, batch_size=4)
    assert torch.equal(images, before)
    assert seen == [(torch.float32, (4, 3, 8, 8), -1.0, 1.0), (torch.float32, (3, 3, 8, 8), -1.0, 1.0)]


def test_no_batch_size_matters():
    detector = Detector("mine", lambda x: {"score": brightness(x)})
    whole = detector.detect(IMAGES, batch_size=100)
    for size in (1, 2, 7):
        assert torch.equal(detector.detect(IMAGES, batch_size=size).score, whole.score)


WRONG = {
    "no score": (lambda x: {"scores": brightness(x)}, "returns scores; score is expected"),
    "nothing": (lambda x: {}, "returns nothing; score"),
    "misspelt flag": (lambda x: {"score": brightness(x), "flags": x > 0}, "returns score, flags; score is expected"),
    "no mapping": (brightness, "returns a Tensor; a mapping"),
    "short": (lambda x: {"score": brightness(x)[1:]}, r"score has the shape \[6\] for 7 images; \[7\] is expected"),
    "one number": (lambda x: {"score": 0.5}, r"shape \[\] for 7 images"),
    "two columns": (lambda x: {"score": torch.zeros(7, 2)}, r"shape \[7, 2\]"),
    "text": (lambda x: {"score": "high"}, "score is a str, not a tensor"),
    "nan": (lambda x: {"score": brightness(x) / 0 * 0}, "score holds values that are not finite"),
    "infinite": (lambda x: {"score": brightness(x) / 0}, "not finite"),
    "percent": (lambda x: {"score": torch.full((7,), 98.0)}, r"score must lie in 0..1, found 98..98"),
    "logit": (lambda x: {"score": torch.full((7,), -0.5)}, "found -0.5..-0.5"),
    "half a face": (lambda x: {"score": brightness(x), "faces": torch.full((7,), 0.5)}, "faces must be whole"),
    "minus one face": (lambda x: {"score": brightness(x), "faces": torch.full((7,), -1)}, "faces must be whole"),
    "few faces": (lambda x: {"score": brightness(x), "faces": [1, 2]}, r"faces has the shape \[2\]"),
    "doubtful flag": (lambda x: {"score": brightness(x), "flag": brightness(x) / 2}, "flag must be true or false"),
    "failure": (lambda x: {"score": x @ x[0, 0, 0, :5]}, "failed: RuntimeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_names_the_detector(name):
    function, message = WRONG[name]
    with pytest.raises(ModelError, match=message) as caught:
        Detector("my.own:thing", function).detect(IMAGES)
    assert str(caught.value).startswith("detector my.own:thing: ")
    assert "\n" not in str(caught.value)


def test_a_rounded_one_is_no_mistake():
    said = detect(score=lambda x: torch.full((len(x),), 1 + 5e-7))
    assert said.score.tolist() == [1.0] * 7


def test_faces_in_some_batches_only():
    with pytest.raises(ModelError, match="faces for some batches"):
        Detector(
            "mine", lambda x: {"score": brightness(x)} | ({"faces": [1] * 3} if len(x) == 3 else {})
        ).detect(IMAGES, batch_size=3)  # fmt: skip


def test_a_word_of_a_judge_folder(folders):
    folder, network = folders["words"]
    said = {word: load_detector(f"{folder}:{word}").detect(IMAGES) for word in ("circle", "square", "star", "red")}
    with torch.no_grad():
        logits = network(IMAGES)
    shape, colour = logits[:, :3].softmax(1), logits[:, 3:].softmax(1)
    for i, word in enumerate(("circle", "square", "star")):
        torch.testing.assert_close(said[word].score, shape[:, i].double(), atol=1e-6, rtol=0)
        assert torch.equal(said[word].flag, shape.argmax(1) == i)
    torch.testing.assert_close(said["red"].score, colour[:, 0].double(), atol=1e-6, rtol=0)
    assert said["circle"].faces.tolist() == [1] * 7
    assert sum(word.flag.int() for name, word in said.items() if name != "red").tolist() == [1] * 7


def test_a_class_of_a_judge_folder(folders):
    folder, network = folders["classes"]
    with torch.no_grad():
        expected = network(IMAGES).softmax(1)[:, 2].double()
    torch.testing.assert_close(load_detector(f"{folder}:2").detect(IMAGES).score, expected, atol=1e-6, rtol=0)
    folder, network = folders["pair"]
    with torch.no_grad():
        expected = network(IMAGES).softmax(1)[:, 1].double()
    torch.testing.assert_close(load_detector(f"{folder}").detect(IMAGES).score, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("words", "", "which word.*one of circle, square, star, red, blue"),
        ("words", ":cirle", "which word"),
        ("words", ":", "which word"),
        ("classes", "", "which class.*from 0 to 3"),
        ("classes", ":4", "which class"),
        ("classes", ":-1", "which class"),
        ("classes", ":circle", "which class"),
    ],
)
def test_a_word_that_the_judge_has_not(folders, name, word, message):
    with pytest.raises(RecipeError, match=message):
        load_detector(f"{folders[name][0]}{word}")


def test_a_folder_that_is_no_judge(tmp_path):
    with pytest.raises(ModelError, match=r"no judge here.*config\.json is missing"):
        load_detector(f"{tmp_path}:circle")


@pytest.mark.parametrize("attributes", [["circle"], {"shape": []}, {"shape": ["circle"]}, {"shape": "abcde"}, 5])
def test_attributes_that_do_not_fit(folders, tmp_path, attributes):
    target = tmp_path / "judge"
    target.mkdir()
    source = folders["words"][0]
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"attributes": attributes}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="attributes must be lists of words, 5 in all"):
        load_detector(f"{target}:circle")


def test_images_of_another_size(folders):
    with pytest.raises(ModelError, match=r"^detector .*:circle: the judge was made for images of \(3, 8, 8\)"):
        load_detector(f"{folders['words'][0]}:circle").detect(torch.zeros(2, 3, 16, 16))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """write(name, source) puts a module into the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_function_of_the_users(module):
    module("my_detector", "def dark(images):\n    return {'score': (1 - images.mean((1, 2, 3))) / 2}\n")
    detector = load_detector("my_detector:dark")
    assert detector.name == "my_detector:dark"
    torch.testing.assert_close(detector.detect(IMAGES).score, 1 - brightness(IMAGES).double(), atol=1e-6, rtol=0)


def test_a_file_lying_about_shadows_no_package(module, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    module("colorsys", "raise SystemExit('planted')\n")
    assert load_detector("colorsys:rgb_to_hsv").function(1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)


def test_a_folder_wins_over_a_module(module, folders, tmp_path):
    module("pair", "def one(images):\n    return {}\n")
    (tmp_path / "pair").symlink_to(folders["pair"][0])
    with pytest.raises(RecipeError, match="which class"):
        load_detector("pair:one")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no such folder; give a judge folder and a word"),
        ("no/such/judge:circle", "no such folder"),
        ("", "no such folder"),
        (":", "no such folder"),
        ("a b:c", "no such folder"),
        ("a\0b:c", "no such folder"),
        ("a" * 5000 + "/b:c", "no such folder"),
        ("nowhere_at_all:detect", "no module nowhere_at_all; install it, or run where nowhere_at_all lies"),
        ("os.nowhere:detect", "no module os.nowhere; install it"),
        ("needy:detect", "no module not_installed_here; needy imports it"),
        ("broken:detect", "broken cannot be imported: SyntaxError"),
        ("leaving:detect", "leaving cannot be imported: SystemExit"),
        ("empty:detect", "in module empty: no detect; name a function"),
        ("full:detect", "detect is a int, which cannot be called"),
    ],
)
def test_a_function_that_cannot_be_had(module, spec, message):
    module("needy", "import not_installed_here\n")
    module("broken", "def detect(images:\n")
    module("leaving", "raise SystemExit(3)\n")
    module("empty", "")
    module("full", "detect = 3\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_detector(spec)
    assert str(caught.value).startswith("--detector ")
    assert "\n" not in str(caught.value)
