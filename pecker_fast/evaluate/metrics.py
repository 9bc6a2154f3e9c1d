"""Distribution metrics on features and logits that were computed elsewhere.

FID and Inception score are torchmetrics' own, fed through a module that returns its input, in float64. torchmetrics has
no improved precision and recall, so that one is here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.errors import DataError


class _Given(nn.Module):
    """Hands features through to a metric that would rather compute them; `num_features` tells it their length."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


HERE: dict[str, Any] = {
    "sync_on_compute": False
}  # among ranks one of them judges; torchmetrics would wait for the others


def fid(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features `real` [M, F] and `fake` [N, F] (Heusel et al. 2017).

    ‖μ_r − μ_f‖² + tr(Σ_r + Σ_f − 2 (Σ_r Σ_f)^½), covariances with n − 1. It falls with more samples for no better
    images (bias ~ 1/n): compare only figures made with equal M and N.

    Raises:
        DataError: fewer than 2 samples on a side, or features of different length.
    """
    _check(real, fake, at_least=2)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), **HERE).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, metric.compute().item())


def fid_floor(features: Tensor, labels: Tensor, seed: int) -> float:
    """FID of real against real: two disjoint halves of `features` [M, F], every class of `labels` [M] split evenly.

    Halves carry about twice the bias of a comparison with all M samples on a side, so the floor errs on the high side.
    """
    generator = torch.Generator().manual_seed(seed)
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for c in labels.unique().tolist():
        members = (labels == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        for half, part in zip(halves, members.chunk(2)):
            half.append(part)
    return fid(features[torch.cat(halves[0])], features[torch.cat(halves[1])])


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))) of `logits` [N, K] (Salimans et al. 2016), from 1 to K; the mean over `splits` parts.

    One part by default: the usual 10 are meant for 50,000 images, and parts of a few hundred bias the score downwards.

    Raises:
        DataError: fewer logits than splits, or none.
    """
    if logits.ndim != 2 or len(logits) < max(1, splits):
        raise DataError(f"the Inception score needs logits [N, K] with N ≥ {max(1, splits)}, got {tuple(logits.shape)}")
    from torchmetrics.image.inception import InceptionScore

    # torchmetrics shuffles with the global generator, and warns about the deviation over a single part.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits, **HERE).set_dtype(torch.float64)
        metric.update(logits.double())
        return metric.compute()[0].item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall of `fake` [N, F] against `real` [M, F] (Kynkäänniemi et al. 2019).

    Precision: fraction of fakes inside a ball round some real sample, the ball's radius being the distance to that
    sample's k-th nearest real neighbour (itself not counted). Recall: the same with the two sides exchanged. `chunk`
    rows of the distance matrix are held at a time.

    Raises:
        DataError: a side has no more than k samples, or features of different length.
    """
    _check(real, fake, at_least=k + 1)
    real, fake = real.float(), fake.float()
    return _inside(fake, real, _radii(real, k, chunk), chunk), _inside(real, fake, _radii(fake, k, chunk), chunk)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Summed differences, not ‖a‖² + ‖b‖² − 2ab: equal points must be at distance 0, or balls of radius 0 are empty.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Distance from each of `points` [N, F] to its k-th nearest other one: [N]."""
    return torch.cat([_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(chunk)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    hits = sum(int((_distances(part, centres) <= radii).any(1).sum()) for part in points.split(chunk))
    return hits / len(points)


def _check(real: Tensor, fake: Tensor, at_least: int) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise DataError(f"features must be [M, F] and [N, F], got {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < at_least:
        raise DataError(f"at least {at_least} samples a side needed, got {len(real)} real and {len(fake)} generated")
