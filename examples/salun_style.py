"""Saliency unlearning as many codebases write it, and the same loop on pecker_kernels; from one seed, the same weights.

    python examples/salun_style.py

A small classifier of scikit-learn's digits forgets one class in the manner of SalUn (2310.12508): the gradients over the
forget set say which weights are salient; those are then fine-tuned with random labels on the forget set and the true
ones on the rest. `by_hand` multiplies gradients with a mask and steps torch's Adam on everything; `with_kernels` is its
conversion. Lines that differ are marked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pecker_kernels as pk
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

FORGET, DENSITY, LR, STEPS, BATCH = 0, 0.3, 1e-3, 150, 64


def load_data() -> tuple[Tensor, Tensor]:
    """1,797 images [N, 64] in 0..1, labels [N]."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def pretrained(images: Tensor, labels: Tensor) -> nn.Module:
    """A classifier of all ten classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        pick = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        cross_entropy(model(images[pick]), labels[pick]).backward()
        optimizer.step()
    return model


def forget_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The forget set, once, in order."""
    chosen = labels == FORGET
    yield from zip(images[chosen].split(BATCH), labels[chosen].split(BATCH))


def relabelled_batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Half forget set with random other labels, half the rest with its own."""
    generator = torch.Generator().manual_seed(1)
    forget, retain = (labels == FORGET).nonzero().view(-1), (labels != FORGET).nonzero().view(-1)
    for _ in range(STEPS):
        f = forget[torch.randint(len(forget), (BATCH // 2,), generator=generator)]
        r = retain[torch.randint(len(retain), (BATCH // 2,), generator=generator)]
        wrong = (FORGET + torch.randint(1, 10, (BATCH // 2,), generator=generator)) % 10
        yield images[torch.cat([f, r])], torch.cat([wrong, labels[r]])


def by_hand(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Unlearn in place; returns the mask, 1.0 and 0.0 for each weight."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in forget_batches(images, labels):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad
    scores = torch.cat([s.abs().flatten() for s in sums.values()])
    threshold = scores.topk(round(len(scores) * DENSITY)).values.min()
    mask = {name: (s.abs() >= threshold).float() for name, s in sums.items()}

    optimizer = torch.optim.Adam(model.parameters(), LR)
    for x, y in relabelled_batches(images, labels):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            p.grad *= mask[name]
        optimizer.step()
    return mask


def with_kernels(model: nn.Module, images: Tensor, labels: Tensor, impl: str = "auto") -> pk.SaliencyMask:
    """The same on pecker_kernels; returns the mask, one bit for each weight."""
    scores = pk.SaliencyScores(model.named_parameters())  # was: a dictionary of sums
    for x, y in forget_batches(images, labels):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        scores.accumulate()  # was: a loop over parameters
    mask = pk.SaliencyMask.from_scores(scores, density=DENSITY)  # was: concatenate, topk, compare

    optimizer = pk.MaskedAdam(model.named_parameters(), mask, lr=LR, impl=impl)  # was: Adam over everything
    for x, y in relabelled_batches(images, labels):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()  # was: multiply, then step
    return mask


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(on the forgotten class, on the others)."""
    right = model(images).argmax(1) == labels
    return float(right[labels == FORGET].float().mean()), float(right[labels != FORGET].float().mean())


def main() -> None:
    images, labels = load_data()
    start = pretrained(images, labels)
    hand, kernels = copy.deepcopy(start), copy.deepcopy(start)
    by_hand(hand, images, labels)
    mask = with_kernels(kernels, images, labels)
    gap = max(float((p - q).detach().abs().max()) for p, q in zip(hand.parameters(), kernels.parameters()))
    for name, model in (("start", start), ("by hand", hand), ("pecker_kernels", kernels)):
        print("{}: forgotten class {:.1%}, others {:.1%}".format(name, *accuracy(model, images, labels)))
    print(f"{mask}; largest difference of a weight {gap:.2g} after {STEPS} steps of {LR}")


if __name__ == "__main__":
    main()
