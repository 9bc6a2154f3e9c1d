"""The judge of the shapes: one classifier for all words, one answer for each attribute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.data import ATTRIBUTES, random_words, render
from pecker_fast.errors import ModelError
from pecker_fast.evaluate import (
    Classifier,
    PatchMixer,
    SmallClassifier,
    WordJudge,
    disagreement,
    load_word_judge,
    save_word_judge,
)
from pecker_fast.pretrain.fit import fit, resumable
from pecker_fast.pretrain.judge import REFERENCE, WEIGHTS
from pecker_fast.pretrain.settings import Settings
from pecker_fast.pretrain.shapes.settings import SIZE, ShapesSettings
from pecker_fast.pretrain.shapes.vae import as_floats, decode, encode

COUNTS = [len(words) for words in ATTRIBUTES.values()]
BLUR = ((0.0625, 0.125, 0.0625), (0.125, 0.25, 0.125), (0.0625, 0.125, 0.0625))
FRESH = 2000  # pictures, never trained on, that accuracy is measured with


def augment(x: Tensor, noise: float, g: torch.Generator) -> Tensor:
    """Pictures `[n, 3, H, W]`, half of them a little blurred, all of them with noise of a random strength."""
    n, channels = x.shape[:2]
    kernel = torch.tensor(BLUR).expand(channels, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
    x = torch.where((torch.rand(n, generator=g) < 0.5).view(-1, 1, 1, 1), blurred, x)
    return x + noise * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Mean over the attributes of the cross-entropy of logits `[n, K]` with word indices `[n, 4]`."""
    parts = zip(logits.split(COUNTS, 1), words.unbind(1))
    return torch.stack([F.cross_entropy(part, word) for part, word in parts]).mean()


@dataclass(frozen=True)
class Plan:
    """One of the two judges. part: its folder. stream, seed: of its draws. references: pictures whose features it keeps."""

    part: str
    stream: str
    kind: type[Classifier]
    settings: Settings
    width: int
    seed: int
    references: int


def first(settings: ShapesSettings, seed: int) -> Plan:
    """The judge: convolutions."""
    return Plan(
        "judge", "shapes-judge", SmallClassifier, settings.judge, settings.judge_width, seed, settings.references
    )


def second(settings: ShapesSettings, seed: int) -> Plan:
    """The second judge: no convolution, another seed."""
    return Plan("second_judge", "shapes-second", PatchMixer, settings.second, settings.second_width, seed + 1, 0)


def train_judge(
    folder: Path, vae: Any, pool: Tensor, words: Tensor, settings: ShapesSettings, plan: Plan, seed: int,
    device: torch.device,
) -> WordJudge:  # fmt: skip
    """A judge of the model folder `folder`, trained where it is not stored yet; half of what it sees went through the VAE.

    pool: uint8 pictures `[n, 3, H, W]`; words: what they show, int64 `[n, 4]`. seed: of the pool. Its info tells, for each
    attribute, the accuracy on fresh pictures and on their round trips, which are equal for both judges.
    """
    target = folder / plan.part
    if (stored := _finished(target, plan)) is not None:
        return stored
    own = plan.settings
    trips = (127.5 * (decode(vae, encode(vae, pool[: len(pool) // 2])) + 1)).round().to(torch.uint8)
    with torch.random.fork_rng([]):
        torch.manual_seed(draws.generator(plan.seed, f"{plan.stream}-init").initial_seed())
        network = plan.kind(3, SIZE, sum(COUNTS), plan.width, settings.judge_features)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_at(step: int) -> Tensor:
        g = draws.generator(plan.seed, plan.stream, step)
        index = torch.randint(len(trips), (own.batch_size,), generator=g)
        half = own.batch_size // 2
        images = torch.cat([pool[index[:half]], trips[index[half:]]])
        x = augment(as_floats(images), settings.judge_noise, g).contiguous(memory_format=torch.channels_last)
        return word_loss(network(x.to(device)), words[index].to(device))

    state, save, _ = resumable(folder, plan.part, network, own)
    fit(plan.part.replace("_", " "), state, loss_at, own, save)
    save_word_judge(target, network, ATTRIBUTES)  # rounded; everything below is measured with the rounded judge
    judge = loaded(target)

    fresh_words = random_words(FRESH, seed, "shapes-fresh")
    fresh = quantise(render(fresh_words, torch.arange(len(pool), len(pool) + FRESH), seed))
    again = decode(vae, encode(vae, fresh))
    info = {
        "fresh_accuracy": accuracies(judge, as_floats(fresh), fresh_words),
        "round_trip_accuracy": accuracies(judge, again, fresh_words),
        "fresh_images": FRESH,
        "seed": plan.seed,
        "steps": own.steps,
    }
    if not plan.references:
        other = loaded(folder / "judge")
        info |= {
            "fresh_disagreement": disagreement(other, judge, as_floats(fresh)),
            "round_trip_disagreement": disagreement(other, judge, again),
        }
        save_word_judge(target, network, ATTRIBUTES, info=info)
        return loaded(target)
    shown = random_words(plan.references, seed, "shapes-reference")
    start = len(pool) + FRESH
    real = as_floats(quantise(render(shown, torch.arange(start, start + len(shown)), seed)))
    save_word_judge(target, network, ATTRIBUTES, judge.features(real), shown, info)
    return loaded(target)


def _finished(folder: Path, plan: Plan) -> WordJudge | None:
    """A judge that is there with all that belongs to it."""
    if not (folder / (REFERENCE if plan.references else WEIGHTS)).is_file():
        return None
    judge = loaded(folder)
    return judge if judge.info else None  # else written before it was measured


def check_fit(folder: Path) -> None:
    """Raises ModelError where the judge of another model was made for other pictures or words."""
    judge = load_word_judge(folder)
    size = getattr(judge.judge.network, "config", {}).get("sample_size") if judge is not None else None
    if judge is None or judge.attributes != ATTRIBUTES or size != SIZE:
        raise ModelError(f"parts_of: {folder} is no judge of the words of shapes, at {SIZE} pixels; leave it out")


def loaded(folder: Path) -> WordJudge:
    judge = load_word_judge(folder)
    assert judge is not None, "it was written with its words"
    return judge


def quantise(images: Tensor) -> Tensor:
    """float pictures in [-1, 1] as uint8."""
    return (127.5 * (images + 1)).round().to(torch.uint8)


def accuracies(judge: WordJudge, images: Tensor, words: Tensor) -> dict[str, float]:
    """Share of pictures `[n, 3, H, W]` in which the judge sees the right word, for each attribute."""
    seen = judge.seen(images)
    return {
        name: sum(names[w] == word for w, word in zip(words[:, i].tolist(), seen[name])) / len(words)
        for i, (name, names) in enumerate(ATTRIBUTES.items())
    }
