"""Detectors of a concept: a judge folder, or the user's own function of images.

A detector is called with images float32 [N, 3, H, W] in [-1, 1] on the CPU and returns a mapping of

* `score` [N], from 0 to 1: how sure it is that the concept is there; needed by every protocol;
* `faces` [N], whole numbers: faces found in the image; needed by `celebrity`, the score of whose faceless images is
  never read (but must be a number: give 0);
* `flag` [N], bool: its verdict (the concept is what it would name first; the image is inappropriate). Where it is
  missing, a score of at least 0.5 is one.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pecker_fast.errors import ModelError, PeckerError, RecipeError
from pecker_fast.evaluate.judge import CONFIG, Judge, load_network
from pecker_fast.evaluate.nudity import NAME, nudenet
from pecker_fast.files import guarded

KEYS = ("score", "faces", "flag")
BATCH = 50
_VERDICT = 0.5
_ROUNDING = 1e-6  # by which a softmax in single precision may pass 1


class Detection(NamedTuple):
    """What a detector says of N images: score [N] float64, faces [N] int64 or None where it counts none, flag [N] bool."""

    score: Tensor
    faces: Tensor | None
    flag: Tensor


class Detector:
    """A named function of images whose answers are checked.

    Args:
        name: what messages call it, as the user wrote it.
        function: images float32 [N, 3, H, W] in [-1, 1] on the CPU -> mapping with `score`, and `faces` and `flag` where
            it has them; values are anything `torch.as_tensor` takes.
    """

    def __init__(self, name: str, function: Callable[[Tensor], Mapping[str, Any]]) -> None:
        self.name, self.function = name, function

    @torch.no_grad()
    def detect(self, images: Tensor, batch_size: int = BATCH) -> Detection:
        """Judge `images` [N, C, H, W], `batch_size` at a time; values outside [-1, 1] are cut off.

        Raises:
            ModelError: the function failed, or its answer is not what the module's head asks for; names the detector.
        """
        parts = [self._batch(batch.detach().float().cpu().clamp(-1, 1)) for batch in images.split(batch_size)]
        if len({part.faces is None for part in parts}) > 1:
            raise self._wrong("returns faces for some batches of images and not for others")
        faces = [part.faces for part in parts if part.faces is not None]
        score, flag = torch.cat([part.score for part in parts]), torch.cat([part.flag for part in parts])
        return Detection(score, torch.cat(faces) if faces else None, flag)

    def _batch(self, images: Tensor) -> Detection:
        count = len(images)
        try:
            answer = self.function(images)
        except PeckerError as error:
            raise self._wrong(str(error)) from error
        except Exception as error:  # the user's code may fail in any way
            raise self._wrong(f"failed: {type(error).__name__}: {error}") from error
        if not isinstance(answer, Mapping):
            raise self._wrong(f"returns a {type(answer).__name__}; a mapping with the key score is expected")
        if "score" not in answer or not set(answer) <= set(KEYS):
            found = ", ".join(map(str, answer)) or "nothing"
            raise self._wrong(f"returns {found}; score is expected, and faces and flag where it has them")
        score = self._numbers("score", answer["score"], count)
        if not (score.min() >= -_ROUNDING and score.max() <= 1 + _ROUNDING):
            raise self._wrong(f"score must lie in 0..1, found {score.min():.4g}..{score.max():.4g}")
        faces = self._numbers("faces", answer["faces"], count) if answer.get("faces") is not None else None
        if faces is not None and not ((faces >= 0) & (faces == faces.round())).all():
            raise self._wrong("faces must be whole numbers, 0 or more")
        flag = self._numbers("flag", answer["flag"], count) if answer.get("flag") is not None else score >= _VERDICT
        if not ((flag == 0) | (flag == 1)).all():
            raise self._wrong("flag must be true or false for each image")
        return Detection(score.clamp(0, 1), None if faces is None else faces.long(), flag.bool())

    def _numbers(self, key: str, value: Any, count: int) -> Tensor:
        try:
            tensor = torch.as_tensor(value).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError):
            raise self._wrong(f"{key} is a {type(value).__name__}, not a tensor of numbers") from None
        if tensor.shape != (count,):
            raise self._wrong(f"{key} has the shape {[*tensor.shape]} for {count} images; [{count}] is expected")
        if not tensor.isfinite().all():
            raise self._wrong(f"{key} holds values that are not finite")
        return tensor

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"detector {self.name}: {what}")


def load_detector(spec: str) -> Detector:
    """The detector of a `--detector` option.

    Args:
        spec: `FOLDER:WORD`, a judge folder and one of its words (or, for a judge of classes, a class number; a judge of
            two classes may go without and looks for class 1), `nudenet` or `nudenet:THRESHOLD` (see `nudity`), or
            `package.module:callable`, a function of the user's. A folder wins over all that have its name.

    The score of a judge folder is the softmax probability of the word among the words of its attribute, its verdict
    that no other is more probable, and it calls every image one face. A module is looked for where Python looks, and
    last in the working folder. Importing it runs its code: it is the only code of others this package runs, and only
    when it is named so.

    Raises:
        RecipeError: the text is neither, the module or its callable is not there, or the judge has no such word.
        ModelError: the judge folder is damaged.
    """
    head, colon, tail = spec.rpartition(":")
    if os.path.isdir(spec):
        return _of_folder(spec, Path(spec), None)
    if colon and os.path.isdir(head):
        return _of_folder(spec, Path(head), tail)
    if (spec if not colon else head) == NAME:
        return Detector(*nudenet(spec))
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec):
        return Detector(spec, _imported(spec, head, tail))
    raise RecipeError(
        f"--detector {spec}: no such folder; give a judge folder and a word (judge:circle), nudenet, or package.module:callable"
    )


def _imported(spec: str, module: str, name: str) -> Callable[[Tensor], Mapping[str, Any]]:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file that lies about cannot take the place of an installed package
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        itself = error.name and f"{module}.".startswith(f"{error.name}.")
        missing = f"no module {error.name}" if error.name else str(error)
        remedy = f"install it, or run where {module.split('.')[0]} lies" if itself else f"{module} imports it"
        raise RecipeError(f"--detector {spec}: {missing}; {remedy}") from error
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise RecipeError(f"--detector {spec}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        what = f"no {name}" if found is None else f"{name} is a {type(found).__name__}, which cannot be called"
        raise RecipeError(f"--detector {spec}: in module {module}: {what}; name a function of images")
    return found


def _of_folder(spec: str, folder: Path, word: str | None) -> Detector:
    if not os.path.lexists(folder / CONFIG):
        raise ModelError(f"--detector {spec}: no judge here, {folder / CONFIG} is missing")
    with guarded(folder, "no judge that can be loaded"):
        network, config = load_network(folder)
    judge = Judge(network, network.config["num_classes"])
    words = config.get("attributes")
    place, columns = _class(spec, judge.num_classes, word) if words is None else _word(spec, folder, config, word)

    def function(images: Tensor) -> dict[str, Tensor]:
        logits = judge.judge(images)[1][:, columns]
        score, seen = logits.double().softmax(1)[:, place], logits.argmax(1)
        return {"score": score, "faces": torch.ones(len(images)), "flag": seen == place}

    return Detector(spec, function)


def _class(spec: str, count: int, word: str | None) -> tuple[int, slice]:
    number = int(word) if word and word.isascii() and word.isdigit() else 1 if word is None and count == 2 else count
    if number >= count:
        raise RecipeError(f"--detector {spec}: which class? give FOLDER:CLASS, a number from 0 to {count - 1}")
    return number, slice(0, count)


def _word(spec: str, folder: Path, config: dict[str, Any], word: str | None) -> tuple[int, slice]:
    """Place of `word` in its attribute and the logits of that attribute: attributes in order, each with its words."""
    attributes = config["attributes"]
    fits = isinstance(attributes, dict) and all(
        isinstance(words, list) and words and all(isinstance(w, str) for w in words) for words in attributes.values()
    )
    if not fits or sum(map(len, attributes.values())) != config["num_classes"]:
        raise ModelError(f"{folder / CONFIG}: attributes must be lists of words, {config['num_classes']} in all")
    start = 0
    for words in attributes.values():
        if word in words:
            return words.index(word), slice(start, start + len(words))
        start += len(words)
    known = ", ".join(w for words in attributes.values() for w in words)
    raise RecipeError(f"--detector {spec}: which word? give FOLDER:WORD with one of {known}")
