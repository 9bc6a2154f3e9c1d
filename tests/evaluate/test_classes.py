"""`evaluate` on samplers whose every figure is known in advance."""

import json

import pytest
import torch

from pecker_fast.errors import DataError, PeckerError, RecipeError
from pecker_fast.evaluate import Judge, Reference, evaluate, fid, inception_score, precision_recall

K, RETAIN = 5, [1, 2, 3, 4]


def read(images):
    """A judge that reads the class from pixel 0 and takes the other pixels as features."""
    flat = images.flatten(1)
    logits = torch.nn.functional.one_hot((flat[:, 0] * K).round().long(), K).float() * 9
    return flat[:, 1:], logits


JUDGE = Judge(read, K)


def sampler(becomes=lambda labels: labels, shift=0.0):
    """Draws images that the judge calls `becomes(labels)`, features N(label, 1) + shift."""

    def sample(labels, seed):
        noise = torch.randn(len(labels), 1, 2, 3, generator=torch.Generator().manual_seed(seed))
        images = noise + labels.view(-1, 1, 1, 1) + shift
        images[:, 0, 0, 0] = becomes(labels) / K
        return images

    return sample


def reference(n=300):
    labels = torch.arange(n) % K
    return Reference(read(sampler()(labels, 99))[0], labels)


def run(becomes=lambda labels: labels, **changes):
    arguments = {"reference": reference(), "forget": [0], "cover": 1, "retain": RETAIN, "samples": 40, "seed": 0}
    drawn = arguments | changes
    return evaluate(drawn.pop("sampler", sampler(becomes)), JUDGE, **drawn)


def swap(source, target, share=1.0):
    def becomes(labels):
        hit = (labels == source) & (torch.arange(len(labels)) < share * len(labels))
        return torch.where(hit, target, labels)

    return becomes


def test_untouched_model_has_forgotten_nothing():
    result = run()
    assert (result["ua"], result["cover_rate"], result["retain_accuracy"]) == (0.0, 0.0, 1.0)
    assert result["per_class"] == dict.fromkeys("01234", 1.0)
    assert result["samples"] == 40


def test_unlearned_model():
    result = run(swap(0, 1))
    assert (result["ua"], result["cover_rate"], result["retain_accuracy"]) == (1.0, 1.0, 1.0)
    assert result["per_class"]["0"] == 0.0


def test_cover_rate_follows_the_cover_class():
    assert run(swap(0, 1), cover=2)["cover_rate"] == 0.0
    assert run(swap(0, 2), cover=2)["cover_rate"] == 1.0
    assert run(swap(0, 2), cover=2)["ua"] == 1.0


def test_ua_is_divided_by_forget_samples_alone():
    # a quarter forgotten: dividing the 30 remaining by all 80 images would give 0.625
    assert run(swap(0, 1, share=0.25))["ua"] == 0.25


def test_lost_retain_class_shows_in_retain_figures_only():
    result = run(swap(3, 4))
    assert (result["ua"], result["retain_accuracy"]) == (0.0, 0.75)
    assert result["per_class"] == {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0}


def test_pairs_of_forget_and_cover():
    def becomes(labels):
        return torch.where(labels == 0, 3, torch.where(labels == 1, 4, labels))

    pair = {"forget": [0, 1], "retain": [2, 3, 4]}
    assert run(becomes, cover=[3, 4], **pair)["cover_rate"] == 1.0
    assert run(becomes, cover=[4, 3], **pair)["cover_rate"] == 0.0
    assert run(becomes, cover=3, **pair)["cover_rate"] == 0.5
    with pytest.raises(RecipeError, match="each of the 2"):
        run(becomes, cover=[3], **pair)


def test_distribution_metrics_are_those_of_retain_samples_against_retain_references():
    seen = {}

    def spy(labels, seed):
        images = sampler(swap(0, 1))(labels, seed)
        seen["forget" if 0 in labels else "retain"] = images
        return images

    result = run(sampler=spy)
    real = reference().select(RETAIN).features
    features, logits = read(seen["retain"])
    assert result["fid"] == fid(real, features)
    assert (result["precision"], result["recall"]) == precision_recall(real, features)
    assert result["inception_score"] == inception_score(logits)
    assert result["fid"] != fid(reference().features, features)
    assert len(seen["forget"]) == len(seen["retain"]) == 40


def test_worse_samples_have_worse_figures():
    good, bad = run(), run(sampler=sampler(shift=3.0))
    assert bad["fid"] > good["fid"]
    assert bad["precision"] < good["precision"]


def test_without_reference():
    result = run(reference=None)
    assert result["fid"] is result["precision"] is result["recall"] is None
    assert result["inception_score"] == pytest.approx(4, rel=1e-2)
    assert json.loads(json.dumps(result)) == result


def test_labels_are_dealt_in_turn_and_seeds_differ_by_group():
    calls = []

    def spy(labels, seed):
        calls.append((labels.tolist(), seed))
        return sampler()(labels, seed)

    run(sampler=spy, samples=6)
    run(sampler=spy, samples=6)
    run(sampler=spy, samples=6, seed=1)
    assert [labels for labels, _ in calls[:2]] == [[0] * 6, [1, 2, 3, 4, 1, 2]]
    assert calls[:2] == calls[2:4]
    assert len({seed for _, seed in calls}) == 4


def test_blocks_and_batch_size_leave_the_figures_alone():
    sizes = []

    def spy(labels, seed):
        sizes.append(len(labels))
        return sampler()(labels, seed)

    a = run(sampler=spy, samples=1200)
    b = run(sampler=spy, samples=1200, batch_size=7)
    assert a == b
    assert sizes == [1000, 200] * 4


def test_broken_sampler_is_an_error_and_not_a_success():
    def broken(labels, seed):
        images = sampler(swap(0, 1))(labels, seed)
        images[0, 0, 1, 1] = torch.nan
        return images

    with pytest.raises(PeckerError, match="not finite"):
        run(sampler=broken)
    with pytest.raises(PeckerError, match="asked for 40"):
        run(sampler=lambda labels, seed: sampler()(labels, seed)[:-1])


@pytest.mark.parametrize("changes", [{"samples": 0}, {"forget": []}, {"retain": []}])
def test_nothing_to_judge(changes):
    with pytest.raises(RecipeError):
        run(**changes)


def test_reference_without_a_retain_class():
    with pytest.raises(DataError, match="class 4"):
        run(reference=reference().select([0, 1, 2, 3]))
