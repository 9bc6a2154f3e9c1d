"""The judge of words: which word of each attribute an image shows, beside which words its prompt named.

A classifier with one logit for every word, stored as `save_judge` stores it, whose config.json also holds `attributes`
(attribute → words, in the order of the logits) and whose reference also holds `words` `[M, A]`, the index of the word
that each reference image shows within each attribute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast.conditions import Names
from pecker_fast.errors import DataError, ModelError
from pecker_fast.evaluate.classifiers import Classifier
from pecker_fast.evaluate.judge import CONFIG, REFERENCE, Judge, Reference, load_judge, save_judge
from pecker_fast.files import read_json, read_tensors, write_json, write_tensors


class WordJudge:
    """A frozen classifier that answers with one word for each attribute.

    Args:
        judge: its logits are the words of all attributes in turn.
        attributes: attribute → its words; no word, whatever its case, stands twice.
        reference: features `[M, F]` of real images, from the same network; None = none.
        words: int64 `[M, A]`, what the reference images show.

    Raises:
        ModelError: attributes, judge and reference do not fit together.
    """

    def __init__(
        self,
        judge: Judge,
        attributes: Mapping[str, Sequence[str]],
        reference: Tensor | None = None,
        words: Tensor | None = None,
    ) -> None:
        self.judge = judge
        self.attributes = {name: tuple(group) for name, group in attributes.items()}
        every = [word.casefold() for group in self.attributes.values() for word in group]
        if not all(self.attributes.values()) or not all(word.strip() for word in every):
            raise ModelError("attributes: every attribute needs at least one word, and no word may be empty")
        twice = next((word for word, count in Counter(every).items() if count > 1), None)
        if twice is not None:
            raise ModelError(f"attributes: the word {twice!r} stands twice; a word must name its attribute")
        if len(every) != judge.num_classes:
            raise ModelError(f"attributes: {len(every)} words, but the judge has {judge.num_classes} classes")
        if (reference is None) != (words is None):
            raise ModelError("a reference needs features and words")
        if reference is not None and words is not None:
            counts = torch.tensor([len(group) for group in self.attributes.values()])
            whole = not (words.is_floating_point() or words.is_complex() or words.dtype == torch.bool)
            if words.ndim != 2 or not whole or words.shape != (len(reference), len(counts)):
                expected = [len(reference), len(counts)]
                raise ModelError(f"reference: words must be integers {expected}, found {words.dtype} {[*words.shape]}")
            words = words.long()
            if bool(((words < 0) | (words >= counts)).any()):
                raise ModelError("reference: words holds an index that its attribute does not have")
        self._reference, self._words = reference, words
        self._names = {name: Names(group) for name, group in self.attributes.items()}

    @property
    def has_reference(self) -> bool:
        """Whether there are features of real images to compare with."""
        return self._reference is not None

    @property
    def info(self) -> dict[str, Any]:
        """How good the judge is, as stored in its config.json."""
        return self.judge.info

    def expected(self, prompt: str) -> dict[str, str]:
        """Attribute → the word that the prompt names, in any form in which `forget` names a concept.

        An attribute is left out where the prompt names no word of it, or two different ones.
        """
        found = {}
        for name, words in self._names.items():
            named = {word.which for word in words.all(prompt)}
            if len(named) == 1:
                found[name] = self.attributes[name][named.pop()]
        return found

    def seen(self, images: Tensor, batch_size: int = 500) -> dict[str, list[str]]:
        """Attribute → the word seen in each of `images` `[N, C, H, W]` in [-1, 1]."""
        _, logits = self.judge.judge(images, batch_size)
        parts = logits.split([len(group) for group in self.attributes.values()], dim=1)
        return {
            name: [group[i] for i in part.argmax(1).tolist()]
            for (name, group), part in zip(self.attributes.items(), parts)
        }

    def features(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Features `[N, F]` of `images` `[N, C, H, W]` in [-1, 1], float32 on the CPU."""
        return self.judge.judge(images, batch_size)[0]

    def features_showing(self, wanted: Mapping[str, str]) -> Tensor:
        """Features `[m, F]` of the real images that show all the words of `wanted` (attribute → word).

        Raises:
            DataError: there is no reference, or no image is left.
        """
        if self._reference is None or self._words is None:
            raise DataError("this judge has no reference images; pretrain the model again, or leave the comparison out")
        keep = torch.ones(len(self._words), dtype=torch.bool)
        for at, (name, group) in enumerate(self.attributes.items()):
            if name in wanted:
                keep &= self._words[:, at] == group.index(wanted[name])
        if not keep.any():
            raise DataError(f"no reference image shows {', '.join(wanted.values())}")
        return self._reference[keep]

    def reference_features(self, without: Mapping[str, str | Sequence[str]] | None = None) -> Tensor:
        """Features `[m, F]` of the real images that show none of the words of `without` (attribute → word, or words).

        Raises:
            DataError: there is no reference, an attribute or word is unknown, or no image is left.
        """
        if self._reference is None or self._words is None:
            raise DataError("this judge has no reference images; pretrain the model again, or leave the comparison out")
        keep = torch.ones(len(self._words), dtype=torch.bool)
        names = list(self.attributes)
        gone = {name: [words] if isinstance(words, str) else words for name, words in (without or {}).items()}
        for name, word in ((name, word) for name, words in gone.items() for word in words):
            if name not in self.attributes:
                raise DataError(f"unknown attribute {name!r}; the judge knows {', '.join(names)}")
            group = [own.casefold() for own in self.attributes[name]]
            if word.casefold() not in group:
                raise DataError(f"unknown {name} {word!r}; the judge knows {', '.join(self.attributes[name])}")
            keep &= self._words[:, names.index(name)] != group.index(word.casefold())
        if not keep.any():
            raise DataError(
                f"no reference image is left without {', '.join(word for words in gone.values() for word in words)}"
            )
        return self._reference[keep]


def save_word_judge(
    folder: str | Path,
    network: Classifier,
    attributes: Mapping[str, Sequence[str]],
    features: Tensor | None = None,
    words: Tensor | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write the judge's folder: `save_judge`'s files, `attributes` in config.json and `words` in the reference.

    features `[M, F]` and words `[M, A]`: of the reference images; None = no reference. The reference's `labels` are the
    indices of the first attribute. As `save_judge` says, take the features from a judge that was stored and loaded.
    """
    folder = Path(folder)
    WordJudge(
        Judge(lambda x: x, network.config["num_classes"]), attributes, features, words
    )  # raises where they differ
    reference = None if features is None or words is None else Reference(features, words[:, 0])
    save_judge(folder, network, reference, dict(info or {}))
    config = read_json(folder / CONFIG, error=ModelError)
    write_json(folder / CONFIG, {**config, "attributes": {name: list(group) for name, group in attributes.items()}})
    if words is not None:
        tensors, _ = read_tensors(folder / REFERENCE, error=ModelError)
        small = torch.uint8 if network.config["num_classes"] <= 256 else torch.int64
        write_tensors(folder / REFERENCE, {**tensors, "words": words.to(small).contiguous()})


def load_word_judge(folder: str | Path) -> WordJudge | None:
    """Read what `save_word_judge` wrote; None where the folder's config.json has no `attributes`.

    Raises:
        ModelError: as `load_judge`, and where attributes, weights and reference do not fit together.
    """
    folder = Path(folder)
    judge, reference = load_judge(folder)
    attributes = read_json(folder / CONFIG, error=ModelError).get("attributes")
    if attributes is None:
        return None
    if not isinstance(attributes, dict) or not all(
        isinstance(group, list) and all(isinstance(word, str) for word in group) for group in attributes.values()
    ):
        raise ModelError(f"{folder / CONFIG}: attributes must be a mapping from names to lists of words")
    words = None
    if reference is not None:
        words = read_tensors(folder / REFERENCE, error=ModelError)[0].get("words")
        if words is None:
            raise ModelError(f"{folder / REFERENCE}: words is missing; the judge's config has attributes")
    try:
        return WordJudge(judge, attributes, None if reference is None else reference.features, words)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
