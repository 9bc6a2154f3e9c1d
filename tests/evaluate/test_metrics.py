"""Distribution metrics against independent float64 formulas, brute force and constructed cases."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.metrics import pairwise_distances

from pecker_fast.errors import DataError
from pecker_fast.evaluate import fid, fid_floor, inception_score, precision_recall


def draw(n, f, seed, shift=0.0, scale=1.0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed)) * scale + shift


def fid_by_hand(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    gap = real.mean(0) - fake.mean(0)
    sigma_r, sigma_f = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    values, vectors = linalg.eigh(sigma_r)
    root_r = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    root = np.sqrt(linalg.eigvalsh(root_r @ sigma_f @ root_r).clip(0)).sum()  # tr (Σ_r^½ Σ_f Σ_r^½)^½
    return gap @ gap + np.trace(sigma_r + sigma_f) - 2 * root


@pytest.mark.parametrize(
    ("m", "n", "shift", "scale"), [(300, 300, 0.0, 1.0), (200, 350, 0.4, 1.7), (64, 500, -3.0, 0.2)]
)
def test_fid_is_the_formula(m, n, shift, scale):
    mix = draw(12, 12, 9)
    real, fake = draw(m, 12, 1) @ mix, draw(n, 12, 2, shift, scale) @ mix
    assert fid(real, fake) == pytest.approx(fid_by_hand(real, fake), rel=1e-9)


def test_fid_of_relu_features_with_dead_units():
    real, fake = draw(200, 16, 1).relu(), draw(200, 16, 2, 0.2).relu()
    real[:, :5] = fake[:, :5] = 0
    assert fid(real, fake) == pytest.approx(fid_by_hand(real, fake), rel=1e-6)


def test_fid_of_a_shift_is_its_square_and_of_itself_nothing():
    real = draw(500, 8, 3)
    assert fid(real, real) == pytest.approx(0, abs=1e-8)
    assert fid(real, real + 0.5) == pytest.approx(8 * 0.25, rel=1e-6)  # float32 rounds the shifted features
    assert fid(real, real + 0.6) > fid(real, real + 0.5)


def test_fid_floor_uses_disjoint_halves_with_equal_classes():
    real, labels = draw(401, 8, 4), torch.arange(401) % 3
    floor = fid_floor(real, labels, seed=5)
    assert floor == fid_floor(real, labels, seed=5) != fid_floor(real, labels, seed=6)
    assert 0 < floor < 1
    twice = torch.cat([draw(1, 8, 0).expand(100, 8), draw(1, 8, 1).expand(100, 8)])
    assert fid_floor(twice, torch.arange(200) // 100, seed=0) == pytest.approx(0, abs=1e-6)  # 50 of each in each half
    assert fid(twice[:100], twice[100:]) > 1
    state = torch.get_rng_state()
    fid_floor(real, labels, seed=5)
    assert torch.equal(state, torch.get_rng_state())


def test_inception_score_is_the_formula():
    logits = draw(257, 7, 1, scale=3.0)
    p = torch.softmax(logits.double(), 1).numpy()
    by_hand = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert inception_score(logits) == pytest.approx(by_hand, rel=1e-10)
    assert inception_score(logits, splits=10) < inception_score(logits)


def test_inception_score_bounds_and_randomness():
    sure = torch.nn.functional.one_hot(torch.arange(100) % 5).float() * 200
    assert inception_score(sure) == pytest.approx(5, rel=1e-9)
    assert inception_score(sure[::5]) == pytest.approx(1, rel=1e-9)
    state = torch.get_rng_state()
    inception_score(sure, splits=4)
    assert torch.equal(state, torch.get_rng_state())


def precision_recall_by_hand(real, fake, k):
    real, fake = real.double().numpy(), fake.double().numpy()

    def share(points, centres):
        own = pairwise_distances(centres)
        np.fill_diagonal(own, np.inf)
        radii = np.sort(own, axis=1)[:, k - 1]
        cross = pairwise_distances(points, centres)
        return np.mean([any(cross[i, j] <= radii[j] for j in range(len(centres))) for i in range(len(points))])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("m", "n", "shift", "scale"), [(80, 80, 0.0, 1.0), (60, 110, 0.8, 0.5), (110, 60, 0.5, 2.0)])
def test_precision_recall_is_brute_force(k, m, n, shift, scale):
    real, fake = draw(m, 6, 1), draw(n, 6, 2, shift, scale)
    expected = precision_recall_by_hand(real, fake, k)
    assert precision_recall(real, fake, k=k) == expected == precision_recall(real, fake, k=k, chunk=7)
    assert 0 < min(expected) < 1


def test_precision_recall_of_constructed_cases():
    real = draw(100, 4, 1)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    left, right = real, real + 1000
    assert precision_recall(torch.cat([left, right]), left) == (1.0, 0.5)  # a mode is lost: recall
    assert precision_recall(left, torch.cat([left, right])) == (0.5, 1.0)  # a mode is made up: precision


def test_equal_samples_are_inside_balls_of_radius_zero():
    point = draw(1, 64, 1) * 1000
    assert precision_recall(point.expand(9, 64), point.expand(9, 64)) == (1.0, 1.0)
    assert precision_recall(point.expand(9, 64), point.expand(9, 64) + 0.01) == (0.0, 0.0)


def test_radius_does_not_count_the_sample_itself():
    real = torch.tensor([[0.0], [1.0], [3.0]])
    fake = torch.tensor([[-1.5], [4.5], [5.5]])
    # k = 1: radii 1, 1, 2 → [-1, 2] and [1, 5]: only 4.5 is inside. Counting itself, all radii would be 0.
    assert precision_recall(real, fake, k=1)[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", [fid, precision_recall])
def test_too_few_or_unlike_samples_are_refused(metric):
    with pytest.raises(DataError, match="at least"):
        metric(draw(1, 4, 0), draw(50, 4, 0))
    with pytest.raises(DataError, match="features must be"):
        metric(draw(50, 4, 0), draw(50, 5, 0))
    with pytest.raises(DataError):
        inception_score(draw(3, 4, 0), splits=4)


def test_import_stays_cheap():
    code = (
        "import sys, pecker_fast.evaluate as e; e.Judge;"
        "sys.exit(any(m.split('.')[0] in ('torchmetrics', 'matplotlib', 'diffusers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
