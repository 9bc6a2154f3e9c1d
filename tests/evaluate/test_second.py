"""The second judge: another architecture in a folder of its own, read by its type, and how often two judges differ."""

import pytest
import torch

from pecker_fast import files
from pecker_fast.data import random_words, render
from pecker_fast.errors import ModelError
from pecker_fast.evaluate import (
    Judge,
    PatchMixer,
    SmallClassifier,
    WordJudge,
    disagreement,
    load_judge,
    load_second_judge,
    load_word_judge,
    save_judge,
    save_word_judge,
)

WORDS = {"shape": ["circle", "square"], "tone": ["red", "blue", "green"]}


@pytest.mark.parametrize("size", [4, 5, 8, 17, 32])
def test_it_is_rebuilt_from_its_type_and_sizes(tmp_path, size):
    network = PatchMixer(2, size, 3, width=8, features=5)
    save_judge(tmp_path / "second_judge", network, None, {"held_out_accuracy": 0.5})
    judge = load_second_judge(tmp_path)
    assert isinstance(judge, Judge)
    assert isinstance(judge.network, PatchMixer)
    assert judge.info == {"held_out_accuracy": 0.5}
    images = torch.randn(7, 2, size, size)
    features, logits = judge.judge(images)
    assert (features.shape, logits.shape) == ((7, 5), (7, 3))
    assert torch.allclose(logits, network.half().float()(images), atol=1e-5)
    with pytest.raises(ModelError, match="made for images of"):
        judge.judge(torch.zeros(1, 2, size + 1, size + 1))


def test_every_pixel_and_its_place_count():
    """Of a size that patches do not divide as well: the last row and column are seen."""
    torch.manual_seed(0)
    for size in (8, 9):
        network = PatchMixer(1, size, 3, width=8)
        image = torch.randn(1, 1, size, size, requires_grad=True)
        network(image).square().sum().backward()
        assert (image.grad != 0).all()
        moved = network(image.flip(3)) - network(image)
        assert moved.abs().max() > 1e-4


def test_there_is_no_convolution_and_no_shared_weight_with_the_first():
    kinds = {type(module) for module in PatchMixer(1, 8, 3).modules()}
    assert torch.nn.Conv2d not in kinds
    assert torch.nn.Conv2d in {type(module) for module in SmallClassifier(1, 8, 3).modules()}


def test_of_classes_of_words_or_none(tmp_path):
    assert load_second_judge(tmp_path) is None
    save_word_judge(tmp_path / "second_judge", PatchMixer(3, 8, 5, width=4), WORDS)
    judge = load_second_judge(tmp_path)
    assert isinstance(judge, WordJudge)
    assert judge.attributes == {name: tuple(words) for name, words in WORDS.items()}


def test_weights_of_the_other_architecture_are_refused(tmp_path):
    folder = tmp_path / "second_judge"
    save_judge(folder, PatchMixer(1, 8, 3), None, {})
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {**config, "type": "SmallClassifier"})
    with pytest.raises(ModelError, match="must be"):
        load_second_judge(tmp_path)
    files.write_json(folder / "config.json", {**config, "type": ["PatchMixer"]})
    with pytest.raises(ModelError, match="type is"):
        load_second_judge(tmp_path)


def test_how_often_two_judges_differ():
    images = torch.arange(4.0).view(4, 1, 1, 1)

    def judge(*classes, words=None):
        logits = torch.eye(5)[list(classes)]
        found = Judge(lambda x: (x, logits[x.flatten().long()]), 5)
        return found if words is None else WordJudge(found, words)

    assert disagreement(judge(0, 1, 2, 3), judge(0, 1, 4, 4), images) == {"class": 0.5}
    a, b = judge(0, 0, 1, 1, words=WORDS), judge(0, 1, 0, 1, words=WORDS)
    assert disagreement(a, b, images) == {"shape": 0.5, "tone": 0.0}


def test_the_digits_second_judge_is_another_and_as_good():
    from pecker_fast.data.datasets import digits

    folder, data = files.resolve_model("digits"), digits()
    second = load_second_judge(folder)
    first, _ = load_judge(folder / "judge")
    assert second.info["held_out_accuracy"] >= max(0.975, first.info["held_out_accuracy"] - 0.01)
    assert second.accuracy(data.images, data.labels) > 0.98
    assert 0 < disagreement(first, second, data.images)["class"] < 0.02
    assert second.info["seed"] != first.info["seed"]
    assert type(second.network) is not type(first.network)


def test_the_shapes_second_judge_is_another_and_as_good():
    folder = files.resolve_model("shapes")
    first, second = load_word_judge(folder / "judge"), load_second_judge(folder)
    for name in first.attributes:
        for figures in ("fresh_accuracy", "round_trip_accuracy"):
            assert second.info[figures][name] >= first.info[figures][name] - 0.01, (figures, name)
    words = random_words(200, 7)
    pictures = render(words, torch.arange(200), 7)
    for name, places, seen in zip(first.attributes, words.unbind(1), second.seen(pictures).values()):
        wanted = [first.attributes[name][place] for place in places.tolist()]
        assert sum(a == b for a, b in zip(seen, wanted)) >= 196, name
    assert second.info["seed"] != first.info["seed"]
    assert type(second.judge.network) is not type(first.judge.network)
