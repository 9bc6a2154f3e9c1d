"""The judge of words, with a vocabulary that is not the shapes': what a prompt names, what an image shows, what is stored."""

import json
from pathlib import Path

import pytest
import torch

from pecker_fast import files
from pecker_fast.errors import DataError, ModelError
from pecker_fast.evaluate.classifiers import SmallClassifier
from pecker_fast.evaluate.judge import Judge, load_judge, save_judge
from pecker_fast.evaluate.words import WordJudge, load_word_judge, save_word_judge

ATTRIBUTES = {"animal": ("cat", "polar bear", "bear"), "tone": ("green", "green glass")}


def mean_levels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Five logits that are five pixels of the first row."""
    return x.flatten(1)[:, :2], x[:, 0, 0, :5]


def judge() -> WordJudge:
    words = torch.tensor([[0, 0], [1, 1], [2, 0], [2, 1]])
    return WordJudge(Judge(mean_levels, 5), ATTRIBUTES, torch.arange(8.0).view(4, 2), words)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Cat, green glass.", {"animal": "cat", "tone": "green glass"}),
        ("polar bear", {"animal": "polar bear"}),
        ("a green BEAR", {"animal": "bear", "tone": "green"}),
        ("concatenate Bears in greenish", {"animal": "bear"}),
        ("a bobcat in an evergreen", {}),
        ("a polar bear and a bear", {}),
        ("a cat beside a bear, green", {"tone": "green"}),
        ("cat, cat and cat", {"animal": "cat"}),
        ("", {}),
    ],
)
def test_expected_names_whole_words(prompt: str, expected: dict[str, str]) -> None:
    assert judge().expected(prompt) == expected


def test_seen_answers_each_attribute_by_its_own_logits() -> None:
    images = torch.zeros(3, 1, 5, 5)
    images[0, 0, 0] = torch.tensor([9.0, 1, 2, 0, 1])
    images[1, 0, 0] = torch.tensor([0.0, 1, 2, 9, 1])
    images[2, 0, 0] = torch.tensor([0.0, 3, 2, 0, 9])
    expected = {"animal": ["cat", "bear", "polar bear"], "tone": ["green glass", "green", "green glass"]}
    assert judge().seen(images) == expected
    assert judge().seen(images, batch_size=2) == expected
    assert judge().features(images).shape == (3, 2)


def test_reference_leaves_out_what_shows_a_word() -> None:
    assert judge().reference_features()[:, 0].tolist() == [0, 2, 4, 6]
    assert judge().reference_features({"animal": "Bear"})[:, 0].tolist() == [0, 2]
    assert judge().reference_features({"animal": "bear", "tone": "green"})[:, 0].tolist() == [2]
    for without, message in (({"size": "big"}, "animal, tone"), ({"tone": "blue"}, "green glass")):
        with pytest.raises(DataError, match=message):
            judge().reference_features(without)
    with pytest.raises(DataError, match="no reference image is left"):
        WordJudge(Judge(mean_levels, 5), ATTRIBUTES, torch.ones(1, 2), torch.tensor([[0, 0]])).reference_features(
            {"animal": "cat"}
        )
    with pytest.raises(DataError, match="no reference images"):
        WordJudge(Judge(mean_levels, 5), ATTRIBUTES).reference_features({})


def test_a_stored_judge_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SmallClassifier(3, 8, 5, width=4, features=6)
    words = torch.tensor([[0, 1], [2, 0], [1, 1]])
    save_word_judge(tmp_path, network, ATTRIBUTES, torch.rand(3, 6), words, {"accuracy": 0.5})
    back = load_word_judge(tmp_path)
    assert back is not None
    assert back.attributes == ATTRIBUTES
    assert back.info == {"accuracy": 0.5}
    assert len(back.reference_features({"animal": "cat"})) == 2
    images = torch.rand(7, 3, 8, 8)
    plain, reference = load_judge(tmp_path)  # the same folder serves the judge of classes
    assert reference is not None
    assert reference.labels.tolist() == [0, 2, 1]
    assert torch.equal(back.features(images), plain.judge(images)[0])
    assert files.read_tensors(tmp_path / "reference.safetensors")[0]["words"].dtype == torch.uint8


def test_a_judge_of_classes_is_no_judge_of_words(tmp_path: Path) -> None:
    save_judge(tmp_path, SmallClassifier(3, 8, 5, width=4, features=6), None, {})
    assert load_word_judge(tmp_path) is None
    with pytest.raises(ModelError, match="no judge here"):
        load_word_judge(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"animal": ["cat", "bear"], "tone": ["green", "Cat", "blue"]}, "stands twice"),
        ({"animal": ["cat", "bear"]}, "2 words, but the judge has 5 classes"),
        ({"animal": ["a", "b", "c", "d", "e"], "tone": []}, "at least one word"),
        ({"animal": "abcde"}, "lists of words"),
        (["a", "b", "c", "d", "e"], "lists of words"),
        ({"animal": [1, 2, 3, 4, 5]}, "lists of words"),
        ({"animal": ["a", "b", "c", "d", "e"]}, r"\[3, 1\]"),
        ({"animal": ["a", "b"], "tone": ["c", "d", "e"]}, "index"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(tmp_path: Path, attributes: object, message: str) -> None:
    network = SmallClassifier(3, 8, 5, width=4, features=6)
    save_word_judge(tmp_path, network, ATTRIBUTES, torch.rand(3, 6), torch.tensor([[0, 1], [2, 0], [1, 1]]))
    config = files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"attributes": attributes}))
    with pytest.raises(ModelError, match=message) as caught:
        load_word_judge(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_reference_without_words_is_refused(tmp_path: Path) -> None:
    network = SmallClassifier(3, 8, 5, width=4, features=6)
    save_word_judge(tmp_path, network, ATTRIBUTES, torch.rand(3, 6), torch.tensor([[0, 1], [2, 0], [1, 1]]))
    tensors, _ = files.read_tensors(tmp_path / "reference.safetensors")
    tensors.pop("words")
    files.write_tensors(tmp_path / "reference.safetensors", tensors)
    with pytest.raises(ModelError, match="words is missing"):
        load_word_judge(tmp_path)
