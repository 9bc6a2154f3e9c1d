"""Training of the judge: the small classifier that tells whether samples are what they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.data import Dataset
from pecker_fast.errors import DataError
from pecker_fast.pretrain.fit import fit, resumable
from pecker_fast.pretrain.settings import Settings

BATCH_SIZE = 64
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05


def augment(images: Tensor, settings: Settings, g: torch.Generator) -> Tensor:
    """Images `[n, C, H, W]` with an own random shift each, mirrored where the settings say so, and a little noise."""
    n, _, height, width = images.shape
    reach = min(settings.judge_shift, height - 1, width - 1)
    if reach:
        edges = (reach,) * 4
        if settings.judge_background is None:
            padded = F.pad(images, edges, mode="reflect")
        else:
            padded = F.pad(images, edges, value=settings.judge_background)
        # half of the images stay where they are, the others move up to `reach` pixels in each direction
        moves = torch.randint(0, 2 * reach + 1, (n, 2), generator=g)
        moves = torch.where(torch.rand(n, 1, generator=g) < 0.5, moves, reach)
        rows = moves[:, :1] + torch.arange(height)
        columns = moves[:, 1:] + torch.arange(width)
        images = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if settings.flip:
        images = torch.where((torch.rand(n, generator=g) < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    return images + settings.judge_noise * torch.randn(images.shape, generator=g)


def train_judge(folder: Path, data: Dataset, settings: Settings, seed: int, device: torch.device) -> dict[str, Any]:
    """Train the judge on 1 − `held_out` of the data and write `folder` with the reference features of all of it.

    Returns what is stored as the judge's `info`: its accuracy on the part it was not trained on, and how it was made.
    """
    from pecker_fast.evaluate import Reference, SmallClassifier, load_judge, save_judge

    train, test = data.held_out(settings.held_out, seed)
    if not len(train) or not len(test):
        raise DataError(f"{data.name}: {len(data)} images are too few to train a judge and to hold some out")
    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(seed, "judge-init").initial_seed())
        network = SmallClassifier(
            data.channels, data.sample_size, data.num_classes, settings.judge_width, settings.judge_features
        )
    network.to(device)
    _fit(folder.parent, network, data, train, settings, seed, device)

    save_judge(folder, network, None, {})  # rounds the weights; everything below is measured with the rounded judge
    judge, _ = load_judge(folder)
    parts = torch.arange(len(data)).split(500)
    answers = [judge.judge(data.batch(part)) for part in parts]
    features, logits = (torch.cat(column) for column in zip(*answers))
    right = logits.argmax(1) == data.labels
    info = {
        "held_out_accuracy": right[test].double().mean().item(),
        "held_out_images": len(test),
        "train_accuracy": right[train].double().mean().item(),
        "train_images": len(train),
        "seed": seed,
        "steps": settings.judge_steps,
    }
    save_judge(folder, network, Reference(features, data.labels), info)
    return info


def _fit(
    model: Path, network: nn.Module, data: Dataset, index: Tensor, settings: Settings, seed: int, device: torch.device
) -> None:
    """Train the judge of the model folder `model`, or go on training it."""
    plan = replace(
        settings, steps=settings.judge_steps, lr=settings.judge_lr, lr_warmup=0.3, lr_decay=True,
        weight_decay=WEIGHT_DECAY, clip_norm=None, ema=0.0,
    )  # fmt: skip

    def loss_at(step: int) -> Tensor:
        g = draws.generator(seed, "judge", step)
        chosen = index[torch.randint(len(index), (BATCH_SIZE,), generator=g)]
        images = augment(data.batch(chosen), settings, g).to(device)
        return F.cross_entropy(network(images), data.labels[chosen].to(device), label_smoothing=LABEL_SMOOTHING)

    def resumed(step: int) -> str:
        return f"the teacher is saved, the same command continues with its judge after step {step} of {plan.steps}"

    state, save, _ = resumable(model, "judge", network, plan)
    fit("judge", state, loss_at, plan, save, resumed)
