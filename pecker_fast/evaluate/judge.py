"""The judge: a small classifier, and the features of real images that samples are compared with.

Nothing here is tied to one network: `Judge` takes any module with `.features`, or any callable that returns features
and logits, so a metric can be tested with a tiny network and used with a standard one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.errors import DataError, ModelError
from pecker_fast.evaluate.classifiers import SIZES, TYPES, Classifier
from pecker_fast.files import (
    check_config,
    check_parts,
    empty_tensors,
    read_object,
    read_tensors,
    write_json,
    write_tensors,
)
from pecker_fast.networks import check_numbers

CONFIG, WEIGHTS, REFERENCE = "config.json", "model.safetensors", "reference.safetensors"
MOST_NUMBERS = 500 * 3 * 32 * 32  # of the images judged at a time
MOST_WORDS, LONGEST_WORD = 2000, 200  # of a judge of words


class Judge:
    """A frozen classifier.

    Args:
        network: a module with `.features(x) -> [N, F]` and `forward(x) -> [N, K]`, or any callable that returns the
            pair (features, logits). A module is put into evaluation mode and its weights stop requiring gradients.
        num_classes: number of classes K.
        info: how good it is (`held_out_accuracy`, ...), as stored in judge/config.json.
    """

    def __init__(self, network: Callable[[Tensor], Any], num_classes: int, info: dict[str, Any] | None = None) -> None:
        self.network = network
        self.num_classes = num_classes
        self.info: dict[str, Any] = dict(info or {})
        self._device: torch.device | None = None
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False)
            weight = next(network.parameters(), None)
            self._device = None if weight is None else weight.device

    @torch.no_grad()
    def judge(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features [N, F] and logits [N, K] of `images` [N, C, H, W] in [-1, 1]; both float32, on the CPU.

        batch_size: images at a time; fewer of those larger than 3×32×32, so that memory does not grow with them.

        Raises:
            ModelError: the images have not the size the network was made for, or its answer has not K columns.
        """
        config = getattr(self.network, "config", None)
        if isinstance(self.network, Classifier) and config:
            expected = (config["in_channels"], config["sample_size"], config["sample_size"])
            if tuple(images.shape[1:]) != expected:
                raise ModelError(f"the judge was made for images of {expected}, got {tuple(images.shape[1:])}")
        at_once = max(1, min(batch_size, MOST_NUMBERS // max(1, math.prod(images.shape[1:]))))
        pairs = [self._pair(batch.to(self._device)) for batch in images.split(at_once)]
        features = torch.cat([pair[0].flatten(1).float().cpu() for pair in pairs])
        logits = torch.cat([pair[1].float().cpu() for pair in pairs])
        if logits.shape != (len(images), self.num_classes):
            raise ModelError(
                f"the judge has {self.num_classes} classes and was given {len(images)} images, "
                f"but its logits have the shape {tuple(logits.shape)}"
            )
        return features, logits

    def accuracy(self, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
        """Fraction of `images` [N, C, H, W] whose largest logit is at `labels` [N]."""
        return (self.judge(images, batch_size)[1].argmax(1) == labels.cpu()).double().mean().item()

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = getattr(self.network, "features_and_logits", None)
        if both is not None:
            return both(x)
        features = getattr(self.network, "features", None)
        return (features(x), self.network(x)) if callable(features) else self.network(x)


class Reference:
    """Features of real images.

    Args:
        features: [M, F] floating point, from the same network that judges the samples; kept as float32.
        labels: [M] integer classes.

    Raises:
        DataError: the shapes do not fit together, or a feature is not finite.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
            raise DataError(
                f"reference: [M, F] features and [M] labels expected, got {[*features.shape]} and {[*labels.shape]}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise DataError(f"reference labels must be integers, got {labels.dtype}")
        if not features.is_floating_point():
            raise DataError(f"reference features must be floating point, got {features.dtype}")
        self.features = features.float()
        self.labels = labels.long()
        if not self.features.isfinite().all():
            raise DataError("reference features contain values that are not finite")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, classes: Iterable[int]) -> Reference:
        """The part that belongs to `classes`; a class without a single feature raises DataError."""
        wanted = sorted(set(classes))
        missing = sorted(set(wanted) - set(self.labels.unique().tolist()))
        if missing:
            raise DataError(f"the reference holds no features of class {', '.join(map(str, missing))}")
        keep = torch.isin(self.labels, torch.tensor(wanted, dtype=torch.long))
        return Reference(self.features[keep], self.labels[keep])


def save_judge(
    folder: str | Path,
    network: Classifier,
    reference: Reference | None,
    info: dict[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `folder`/config.json, model.safetensors and, with a reference, reference.safetensors.

    Weights and features are stored as `dtype`. Rounding moves the features a little: make the reference with the judge
    that `load_judge` gives back, so that both sides of a comparison come from the same weights.
    """
    folder = Path(folder)
    write_json(folder / CONFIG, {"type": type(network).__name__, **network.config, "info": info})
    weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in network.state_dict().items()}
    write_tensors(folder / WEIGHTS, weights)
    if reference is not None:
        labels = reference.labels
        small = torch.uint8 if network.config["num_classes"] <= 256 else torch.int64
        tensors = {"features": reference.features.to(dtype).contiguous(), "labels": labels.to(small).contiguous()}
        write_tensors(folder / REFERENCE, tensors)


def load_judge(folder: str | Path) -> tuple[Judge, Reference | None]:
    """Read what `save_judge` wrote; the reference is None where the folder has none.

    Raises:
        ModelError: the folder or a file is missing, config.json describes no classifier that is known, or the weights do
            not fit it.
    """
    network, config = load_network(folder)
    judge = Judge(network, network.config["num_classes"], config.get("info", {}))
    reference = Path(folder) / REFERENCE
    return judge, _read_reference(reference, network) if reference.is_file() else None


def load_network(folder: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a judge's folder and its config.json, looked at as any foreign folder is. Raises ModelError."""
    folder = Path(folder)
    check_parts(folder, ("",))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no judge here, {name} is missing")
    config = read_object(folder / CONFIG)
    check_config(folder / CONFIG, dict.fromkeys(("type", *SIZES)) | config, "judge")
    check_config(folder / CONFIG, config.get("info", {}), "judge's info")
    _check_words(folder / CONFIG, config.get("attributes"))
    return _build(config, folder), config


def _check_words(path: Path, attributes: Any) -> None:
    """Raises ModelError for more or longer words than names of things can be: an expression is made of them."""
    groups = attributes.values() if isinstance(attributes, dict) else ()
    words = [str(word) for group in groups for word in (group if isinstance(group, list) else ())]
    if len(words) > MOST_WORDS or any(len(word) > LONGEST_WORD for word in words):
        raise ModelError(f"{path}: attributes: at most {MOST_WORDS:,} words of {LONGEST_WORD} characters are expected")


def _build(config: dict[str, Any], folder: Path) -> Classifier:
    with torch.device("meta"):  # nothing is allocated and no random number drawn before the shapes are known to fit
        network = TYPES[config["type"]](*(config[key] for key in SIZES))
    _check_stored(empty_tensors(folder / WEIGHTS, error=ModelError), network, folder)
    stored, _ = read_tensors(folder / WEIGHTS, error=ModelError)
    _check_stored(stored, network, folder)
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, assign=True)
    return network


def _check_stored(stored: dict[str, Tensor], network: Classifier, folder: Path) -> None:
    """Raises ModelError unless the tensors are the network's, by name and shape, and finite numbers."""
    for name, empty in network.state_dict().items():
        if name not in stored or stored[name].shape != empty.shape:
            found = tuple(stored[name].shape) if name in stored else "nothing"
            raise ModelError(f"{folder / WEIGHTS}: {name} must be {tuple(empty.shape)}, found {found}")
    if extra := min(set(stored) - set(network.state_dict()), default=None):
        raise ModelError(f"{folder / WEIGHTS}: unexpected tensor {extra}")
    check_numbers(folder / WEIGHTS, stored)


def _read_reference(path: Path, network: Classifier) -> Reference:
    tensors, _ = read_tensors(path, error=ModelError)
    if not {"features", "labels"} <= set(tensors) <= {"features", "labels", "words"}:
        raise ModelError(f"{path}: features and labels expected, found {', '.join(sorted(tensors)) or 'nothing'}")
    try:
        reference = Reference(tensors["features"], tensors["labels"])
    except DataError as error:
        raise ModelError(f"{path}: {error}") from error
    if reference.features.shape[1] != network.config["features"]:
        raise ModelError(
            f"{path}: features of length {reference.features.shape[1]}, the judge makes {network.config['features']}"
        )
    labels = reference.labels
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < network.config["num_classes"]:
        raise ModelError(f"{path}: labels outside 0..{network.config['num_classes'] - 1}")
    return reference
