"""The judge: its classifier, storage and errors."""

import json

import pytest
import torch
from torch import nn

from pecker_fast.errors import DataError, ModelError, PeckerError
from pecker_fast.evaluate import Judge, Reference, SmallClassifier, load_judge, save_judge
from pecker_fast.files import read_tensors, write_tensors


def small(**changes):
    torch.manual_seed(0)
    return SmallClassifier(
        **{"in_channels": 1, "sample_size": 8, "num_classes": 4, "width": 4, "features": 6, **changes}
    )


def reference(n=20, features=6, classes=4):
    generator = torch.Generator().manual_seed(1)
    return Reference(torch.rand(n, features, generator=generator), torch.arange(n) % classes)


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 1), (28, 1), (32, 3), (64, 3)])
def test_classifier_shapes(size, channels):
    network = small(in_channels=channels, sample_size=size)
    x = torch.rand(3, channels, size, size) * 2 - 1
    features, logits = network.features_and_logits(x)
    assert network.features(x).shape == features.shape == (3, 6)
    assert network(x).shape == logits.shape == (3, 4)
    assert (features >= 0).all()
    assert torch.equal(network(x), logits)


def test_classifier_stops_at_four_pixels_and_caps_its_width():
    widths = [layer.out_channels for layer in small(sample_size=64).trunk if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32]
    assert small(sample_size=64).penultimate.in_features == 32 * 4 * 4


def test_classifier_of_tiny_images_is_refused():
    with pytest.raises(ModelError, match="at least 4"):
        small(sample_size=3)


def test_judge_is_frozen_and_its_batch_size_changes_nothing():
    network = small().train()
    judge = Judge(network, 4)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.rand(11, 1, 8, 8)
    features, logits = judge.judge(x)
    assert features.dtype == logits.dtype == torch.float32
    for part, whole in zip(judge.judge(x, batch_size=3), (features, logits)):
        torch.testing.assert_close(part, whole)
    assert judge.accuracy(x, logits.argmax(1)) == 1.0
    assert judge.accuracy(x, logits.argmin(1)) == 0.0


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def features(self, x):
        return x.flatten(1)[:, :5].half()

    def forward(self, x):
        return self.head(self.features(x).float())


@pytest.mark.parametrize("network", [Plain(), lambda x: (x[:, 0], x.flatten(1)[:, :3])])
def test_any_network_can_judge(network):
    features, logits = Judge(network, 3).judge(torch.rand(4, 1, 5, 1))
    assert features.shape == (4, 5)
    assert logits.shape == (4, 3)
    assert features.dtype == torch.float32


def test_judge_refuses_other_images_and_other_classes():
    with pytest.raises(ModelError, match=r"\(1, 8, 8\), got \(3, 8, 8\)"):
        Judge(small(), 4).judge(torch.rand(2, 3, 8, 8))
    with pytest.raises(ModelError, match="has 5 classes"):
        Judge(small(), 5).judge(torch.rand(2, 1, 8, 8))


def test_saved_judge_comes_back(tmp_path):
    network, info = small(), {"held_out_accuracy": 0.99}
    save_judge(tmp_path / "judge", network, reference(), info)
    judge, stored = load_judge(tmp_path / "judge")
    assert judge.info == info
    assert judge.num_classes == 4
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in judge.network.parameters())
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(judge.judge(x)[1], network(x).detach(), atol=2e-3, rtol=0)
    torch.testing.assert_close(stored.features, reference().features, atol=5e-4, rtol=0)
    assert torch.equal(stored.labels, reference().labels)
    tensors, _ = read_tensors(tmp_path / "judge" / "reference.safetensors")
    assert tensors["features"].dtype == torch.float16
    assert tensors["labels"].dtype == torch.uint8


def test_judge_without_reference_and_in_full_precision(tmp_path):
    network = small()
    save_judge(tmp_path, network, None, {}, dtype=torch.float32)
    judge, stored = load_judge(tmp_path)
    assert stored is None
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(judge.judge(x)[1], network(x))


def test_loading_draws_no_random_numbers(tmp_path):
    save_judge(tmp_path, small(), reference(), {})
    before = torch.get_rng_state()
    load_judge(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_reference_select():
    part = reference().select([2, 0, 2])
    assert set(part.labels.tolist()) == {0, 2}
    assert len(part) == 10
    assert torch.equal(part.features, reference().features[torch.arange(20) % 2 == 0])
    with pytest.raises(DataError, match="no features of class 7"):
        reference().select([1, 7])


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.rand(4, 2), torch.zeros(3, dtype=torch.long)),
        (torch.rand(4), torch.zeros(4, dtype=torch.long)),
        (torch.rand(4, 2), torch.rand(4)),
        (torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.long)),
    ],
)
def test_reference_is_checked(features, labels):
    with pytest.raises(DataError):
        Reference(features, labels)


def edit(name, change):
    def damage(folder):
        path = folder / name
        if name == "config.json":
            config = json.loads(path.read_text())
            change(config)
            path.write_text(json.dumps(config))
        else:
            tensors, _ = read_tensors(path)
            change(tensors)
            write_tensors(path, tensors)

    return damage


DAMAGE = {
    "no folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config is cut": lambda folder: (folder / "config.json").write_text('{"type": '),
    "weights are empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights are cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-9]
    ),
    "reference is cut": lambda folder: (folder / "reference.safetensors").write_bytes(b"12345678{"),
    "other type": edit("config.json", lambda config: config.update(type="Inception")),
    "no width": edit("config.json", lambda config: config.pop("width")),
    "huge width": edit("config.json", lambda config: config.update(width=10**9)),
    "width too large for the file": edit("config.json", lambda config: config.update(width=60000)),
    "true for a number": edit("config.json", lambda config: config.update(in_channels=True)),
    "text info": edit("config.json", lambda config: config.update(info="good")),
    "tiny images": edit("config.json", lambda config: config.update(sample_size=2)),
    "tensor missing": edit("model.safetensors", lambda tensors: tensors.pop("head.bias")),
    "tensor too many": edit("model.safetensors", lambda tensors: tensors.update(more=torch.zeros(1))),
    "tensor of another shape": edit("model.safetensors", lambda tensors: tensors.update({"head.bias": torch.zeros(9)})),
    "nan weight": edit("model.safetensors", lambda tensors: tensors["head.bias"].fill_(torch.nan)),
    "integer weight": edit("model.safetensors", lambda tensors: tensors.update({"head.bias": torch.zeros(4).int()})),
    "no labels": edit("reference.safetensors", lambda tensors: tensors.pop("labels")),
    "label out of range": edit("reference.safetensors", lambda tensors: tensors["labels"].fill_(9)),
    "infinite feature": edit("reference.safetensors", lambda tensors: tensors["features"].fill_(torch.inf)),
    "short features": edit(
        "reference.safetensors", lambda tensors: tensors.update(features=tensors["features"][:, :3].contiguous())
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_judge_is_one_line(tmp_path, damage):
    save_judge(tmp_path, small(), reference(), {})
    load_judge(tmp_path)
    damage(tmp_path)
    with pytest.raises(PeckerError) as caught:
        load_judge(tmp_path)
    assert isinstance(caught.value, ModelError)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "4 pixels" in str(caught.value)
