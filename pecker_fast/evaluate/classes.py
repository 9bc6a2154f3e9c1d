"""How well a class-conditional sampler has forgotten some classes and kept the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pecker_fast.errors import PeckerError, RecipeError
from pecker_fast.evaluate.intervals import wilson
from pecker_fast.evaluate.judge import Judge, Reference
from pecker_fast.evaluate.metrics import fid, inception_score, precision_recall

Sampler = Callable[[Tensor, int], Tensor]
"""(labels [N] int64, seed) -> images [N, C, H, W] float32 in [-1, 1]; a pure function of its arguments."""

_NEIGHBOURS = 3
_DRAW = 1000  # images drawn at a time; fixed, so that figures do not depend on a batch size


def evaluate(
    sampler: Sampler,
    judge: Judge,
    reference: Reference | None,
    forget: Sequence[int],
    cover: int | Sequence[int],
    retain: Sequence[int],
    samples: int,
    seed: int,
    batch_size: int = 500,
) -> dict[str, Any]:
    """Judge `samples` images of the forget classes and `samples` of the retain classes, labels dealt in turn.

    Args:
        sampler: draws images for labels; called with the same labels and seeds every time: two models see equal noise.
        judge: the classifier, which also makes the features.
        reference: features of real images, of which those of `retain` are used. None: no `fid`, `precision`, `recall`.
        forget, cover: classes to forget and what takes their place, one for all or one for each.
        retain: classes that must stay.
        samples: images of each group.
        seed: any whole number.
        batch_size: images judged at a time; no figure depends on it.

    Returns:
        `ua`: 1 − accuracy on the forget samples, over the number of forget samples alone.
        `cover_rate`: fraction of forget samples judged to be their cover class.
        `retain_accuracy`: fraction of retain samples judged as conditioned.
        `fid`, `inception_score`, `precision`, `recall`: of the retain samples, against the real retain classes.
        `samples`: as given. `per_class`: accuracy of every class, forget classes included, keyed by the class as text
        (the same before and after JSON). `intervals`: 95 % of each share, by the same keys.

    Raises:
        RecipeError: no class or no samples to judge, or covers and forget classes that do not pair.
        PeckerError: the sampler's images are not finite or not one per label.
        DataError: the reference lacks a retain class, or is too small for the metrics.
    """
    covers = list(cover) if isinstance(cover, Sequence) else [cover] * len(forget)
    if not forget or not retain or samples < 1:
        raise RecipeError(f"evaluate: needs forget classes, retain classes and samples ≥ 1, got {samples} samples")
    if len(covers) != len(forget):
        raise RecipeError(f"cover: one class, or one for each of the {len(forget)} forget classes, got {len(covers)}")

    turn = torch.arange(samples)
    forget_labels = torch.tensor(list(forget))[turn % len(forget)]
    cover_labels = torch.tensor(covers)[turn % len(forget)]
    retain_labels = torch.tensor(list(retain))[turn % len(retain)]

    _, forget_logits = _draw(sampler, judge, forget_labels, seed, "forget", batch_size)
    features, retain_logits = _draw(sampler, judge, retain_labels, seed, "retain", batch_size)
    forget_seen, retain_seen = forget_logits.argmax(1), retain_logits.argmax(1)

    result: dict[str, Any] = {
        "ua": 1.0 - _fraction(forget_seen == forget_labels),
        "cover_rate": _fraction(forget_seen == cover_labels),
        "retain_accuracy": _fraction(retain_seen == retain_labels),
        "fid": None,
        "inception_score": inception_score(retain_logits),
        "precision": None,
        "recall": None,
        "samples": samples,
    }
    if reference is not None and samples > _NEIGHBOURS:
        real = reference.select(retain).features
        result["fid"] = fid(real, features)
        result["precision"], result["recall"] = precision_recall(real, features, k=_NEIGHBOURS)
    labels, seen = torch.cat([forget_labels, retain_labels]), torch.cat([forget_seen, retain_seen])
    counts = {c: int((labels == c).sum()) for c in sorted(labels.unique().tolist())}
    result["per_class"] = {str(c): _fraction(seen[labels == c] == c) for c in counts}
    result["intervals"] = {key: _interval(result[key], samples) for key in ("ua", "cover_rate", "retain_accuracy")}
    result["intervals"]["per_class"] = {str(c): _interval(result["per_class"][str(c)], n) for c, n in counts.items()}
    return result


def _draw(
    sampler: Sampler, judge: Judge, labels: Tensor, seed: int, group: str, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Features [N, F] and logits [N, K] of one image for each of `labels` [N]."""
    features, logits = [], []
    for block, wanted in enumerate(labels.split(_DRAW)):
        digest = hashlib.sha256(f"{seed}/{group}/{block}".encode()).digest()
        images = sampler(wanted, int.from_bytes(digest[:4]) >> 1)
        if images.ndim != 4 or len(images) != len(wanted):
            raise PeckerError(f"the sampler was asked for {len(wanted)} images and returned {tuple(images.shape)}")
        if not images.isfinite().all():  # a judge would call them some class, and a broken model would look unlearned
            raise PeckerError(f"the sampler drew {group} images that are not finite: the generator has diverged")
        pair = judge.judge(images, batch_size)
        features.append(pair[0])
        logits.append(pair[1])
    return torch.cat(features), torch.cat(logits)


def _fraction(hits: Tensor) -> float:
    return hits.double().mean().item()


def _interval(share: float, n: int) -> list[float]:
    return list(wilson(min(n, round(share * n)), n) or ())
