"""Training of the judges: the small classifiers that tell whether samples are what they should be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.data import Dataset
from pecker_fast.errors import DataError, ModelError
from pecker_fast.evaluate import (
    Classifier,
    Judge,
    PatchMixer,
    Reference,
    SmallClassifier,
    disagreement,
    load_judge,
    save_judge,
)
from pecker_fast.pretrain.fit import fit, resumable
from pecker_fast.pretrain.settings import Settings

WEIGHTS, REFERENCE = "model.safetensors", "reference.safetensors"
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


@dataclass(frozen=True)
class Plan:
    """One of the two judges. part: its folder, and the stream of its draws. seed: of init and batches; `split` holds out the same
    images for both."""

    part: str
    kind: type[Classifier]
    steps: int
    lr: float
    width: int
    seed: int
    split: int


def first(settings: Settings, seed: int) -> Plan:
    """The judge: convolutions."""
    return Plan("judge", SmallClassifier, settings.judge_steps, settings.judge_lr, settings.judge_width, seed, seed)


def second(settings: Settings, seed: int) -> Plan:
    """The second judge: no convolution, another seed."""
    steps, lr, width = settings.judge_steps, settings.second_lr, settings.second_width
    return Plan("second_judge", PatchMixer, steps, lr, width, seed + 1, seed)


def train_judge(folder: Path, data: Dataset, settings: Settings, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Train a judge on 1 − `held_out` of the data and write it into the model folder `folder`; the first one with the reference
    features of all of it. One that is finished, taken over from another model perhaps, stays.

    Returns what is stored as the judge's `info`: its accuracy on the part it was not trained on, and how it was made.
    """
    if (found := _finished(folder / plan.part, plan)) is not None:
        return found.info
    train, test = data.held_out(settings.held_out, plan.split)
    if not len(train) or not len(test):
        raise DataError(f"{data.name}: {len(data)} images are too few to train a judge and to hold some out")
    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(plan.seed, f"{plan.part}-init").initial_seed())
        network = plan.kind(*_sizes(data), plan.width, settings.judge_features)
    network.to(device)
    _fit(folder, network, data, train, settings, plan, device)

    target = folder / plan.part
    save_judge(target, network, None, {})  # rounds the weights; everything below is measured with the rounded judge
    judge, _ = load_judge(target)
    parts = torch.arange(len(data)).split(500)
    answers = [judge.judge(data.batch(part)) for part in parts]
    features, logits = (torch.cat(column) for column in zip(*answers))
    right = logits.argmax(1) == data.labels
    info = {
        "held_out_accuracy": right[test].double().mean().item(),
        "held_out_images": len(test),
        "train_accuracy": right[train].double().mean().item(),
        "train_images": len(train),
        "seed": plan.seed,
        "steps": plan.steps,
    }
    if plan.part != "judge":
        held_out = data.batch(test)
        info["held_out_disagreement"] = disagreement(load_judge(folder / "judge")[0], judge, held_out)["class"]
    save_judge(target, network, Reference(features, data.labels) if plan.part == "judge" else None, info)
    return info


def _finished(folder: Path, plan: Plan) -> Judge | None:
    """A judge that is there with all that belongs to it."""
    if not (folder / (REFERENCE if plan.part == "judge" else WEIGHTS)).is_file():
        return None
    judge, _ = load_judge(folder)
    return judge if judge.info else None  # else it was written before it was measured


def check_fit(folder: Path, data: Dataset) -> None:
    """Raises ModelError where the judge of another model was made for other images or classes."""
    judge, _ = load_judge(folder)
    config = getattr(judge.network, "config", {})
    found = tuple(config.get(key) for key in ("in_channels", "sample_size", "num_classes"))
    sizes = _sizes(data)
    if found != sizes:
        theirs, ours = (f"{size}×{size} pixels in {c} channels, {k} classes" for c, size, k in (found, sizes))
        raise ModelError(f"parts_of: its {folder.name} was made for {theirs}, this data set has {ours}; leave it out")


def _sizes(data: Dataset) -> tuple[int, int, int]:
    return data.channels, data.sample_size, data.num_classes


def _fit(
    model: Path,
    network: nn.Module,
    data: Dataset,
    index: Tensor,
    settings: Settings,
    plan: Plan,
    device: torch.device,
) -> None:
    """Train a judge of the model folder `model`, or go on training it."""
    own = replace(
        settings, steps=plan.steps, lr=plan.lr, lr_warmup=0.3, lr_decay=True,
        weight_decay=WEIGHT_DECAY, clip_norm=None, ema=0.0,
    )  # fmt: skip

    def loss_at(step: int) -> Tensor:
        g = draws.generator(plan.seed, plan.part, step)
        chosen = index[torch.randint(len(index), (BATCH_SIZE,), generator=g)]
        images = augment(data.batch(chosen), settings, g).to(device)
        return F.cross_entropy(network(images), data.labels[chosen].to(device), label_smoothing=LABEL_SMOOTHING)

    what = plan.part.replace("_", " ")

    def resumed(step: int) -> str:
        return f"the teacher is saved, the same command continues with its {what} after step {step} of {plan.steps}"

    state, save, _ = resumable(model, plan.part, network, own)
    fit(what, state, loss_at, own, save, resumed)
