"""What is looked for, and who says that it is there: conditions of the concept, and two judges that have to agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pecker_fast.evaluate import Judge, Reference, WordJudge

NEIGHBOURS = 3  # kept conditions nearest to the concept
SHOWN = 8  # images kept of what was drawn, to be looked at


@dataclass(frozen=True)
class Look:
    """What judges say of samples. seen: bool [N]. shown, others: a few of those in which the concept is seen, and is not.
    distance: of what is seen to real images, see `World.distance`."""

    seen: Tensor
    shown: Tensor
    others: Tensor
    distance: float | None

    @property
    def share(self) -> float:
        return self.seen.double().mean().item()


@dataclass(frozen=True)
class World:
    """Base. Rows are conditions of the model: classes, or prompts of its table.

    forget[i] is drawn as cover[i]; kept stays. `judged` are the rows that figures are made of (forget's, of a text model
    captions that nothing was trained on). null: the condition of no condition, None where there is none.
    """

    forget: tuple[int, ...]
    cover: tuple[int, ...]
    kept: tuple[int, ...]
    judged: tuple[int, ...]
    judged_kept: tuple[int, ...]
    null: int | None

    @property
    def judges(self) -> int:
        raise NotImplementedError

    def groups(self) -> Sequence[World]:
        """The same world for each thing that is forgotten, alone: a vector can only be fitted to one."""
        raise NotImplementedError

    def only(self, rows: Collection[int]) -> Self:
        """The world of some of the forgotten rows."""
        pairs = [(row, other) for row, other in zip(self.forget, self.cover) if row in rows]
        judged = tuple(row for row in self.judged if row in rows)
        return replace(self, forget=tuple(a for a, _ in pairs), cover=tuple(b for _, b in pairs), judged=judged)

    def look(self, images: Tensor, rows: Tensor) -> Look:
        """`seen` with what else is told of images [N, C, H, W] in [-1, 1]."""
        seen = self.seen(images, rows)
        at = seen.to(images.device)
        distance = self.distance(images[at], rows[at.to(rows.device)]) if bool(seen.any()) else None
        return Look(seen, images[at][:SHOWN].cpu(), images[~at][:SHOWN].cpu(), distance)

    def seen(self, images: Tensor, rows: Tensor) -> Tensor:
        """Whether each of images [N, C, H, W] shows what row [N] of `forget` or `judged` names, to every judge: bool [N]."""
        raise NotImplementedError

    def right(self, images: Tensor, rows: Tensor) -> Tensor:
        """Whether each image shows what a row to keep names, to the first judge: bool [N]."""
        raise NotImplementedError

    def distance(self, images: Tensor, rows: Tensor) -> float | None:
        """Mean distance of images to the nearest real one of the concept, in the first judge's features, over that of real ones
        to one another; None without real ones."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class ClassWorld(World):
    """Classes, and judges of classes."""

    first: Judge
    second: Judge | None
    reference: Reference | None

    @property
    def judges(self) -> int:
        return 1 if self.second is None else 2

    def groups(self) -> Sequence[ClassWorld]:
        return [self.only({row}) for row in self.forget]

    def seen(self, images: Tensor, rows: Tensor) -> Tensor:
        found = self.right(images, rows)
        if self.second is not None:
            found &= self.second.judge(images)[1].argmax(1) == rows.cpu()
        return found

    def right(self, images: Tensor, rows: Tensor) -> Tensor:
        return self.first.judge(images)[1].argmax(1) == rows.cpu()

    def distance(self, images: Tensor, rows: Tensor) -> float | None:
        if self.reference is None or not len(images):
            return None
        found = []
        for row in rows.unique().tolist():
            real = self.reference.select([row]).features
            found.append(nearness(self.first.judge(images[rows.cpu() == row])[0], real))
        return sum(found) / len(found)

    def name(self, row: int) -> str:
        return "no class" if row == self.null else f"class {row}"


@dataclass(frozen=True)
class TextWorld(World):
    """Prompts, and judges of words. `words`: row -> attribute -> the word that is forgotten there."""

    first: WordJudge
    second: WordJudge | None
    prompts: tuple[str, ...]
    words: dict[int, dict[str, str]]

    @property
    def judges(self) -> int:
        return 1 if self.second is None else 2

    def groups(self) -> Sequence[TextWorld]:
        kinds: dict[tuple[tuple[str, str], ...], set[int]] = {}
        for row, words in self.words.items():
            kinds.setdefault(tuple(sorted(words.items())), set()).add(row)
        found = [self.only(rows) for rows in kinds.values()]
        return [world for world in found if world.forget and world.judged]

    def seen(self, images: Tensor, rows: Tensor) -> Tensor:
        found = self._shown(self.first, images, rows)
        return found if self.second is None else found & self._shown(self.second, images, rows)

    def _shown(self, judge: WordJudge, images: Tensor, rows: Tensor) -> Tensor:
        seen = judge.seen(images)
        wanted = [self.words[row] for row in rows.tolist()]
        return torch.tensor([all(seen[key][i] == word for key, word in want.items()) for i, want in enumerate(wanted)])

    def right(self, images: Tensor, rows: Tensor) -> Tensor:
        seen = self.first.seen(images)
        wanted = [self.first.expected(self.prompts[row]) for row in rows.tolist()]
        return torch.tensor([all(seen[key][i] == word for key, word in want.items()) for i, want in enumerate(wanted)])

    def distance(self, images: Tensor, rows: Tensor) -> float | None:
        if not self.first.has_reference or not len(images):
            return None
        found = []
        for words in {tuple(sorted(self.words[row].items())) for row in rows.tolist()}:
            mine = torch.tensor([tuple(sorted(self.words[row].items())) == words for row in rows.tolist()])
            found.append(nearness(self.first.features(images[mine]), self.first.features_showing(dict(words))))
        return sum(found) / len(found)

    def name(self, row: int) -> str:
        return repr(self.prompts[row])


def text_world(
    forget: Sequence[int], cover: Sequence[int], kept: Sequence[int], judged: tuple[Sequence[int], Sequence[int], Sequence[int]],
    null: int | None, prompts: Sequence[str], first: WordJudge, second: WordJudge | None,
) -> TextWorld:  # fmt: skip
    """judged: forget, cover and kept rows of the captions that figures are made of. Rows whose concept the judge has no word
    for are left out."""
    words: dict[int, dict[str, str]] = {}
    for rows, others in ((forget, cover), judged[:2]):
        for row, other in zip(rows, others):
            drawn = first.expected(prompts[other])
            named = {key: word for key, word in first.expected(prompts[row]).items() if drawn.get(key) != word}
            if named:
                words[row] = named
    pairs = [(row, other) for row, other in zip(forget, cover) if row in words]
    return TextWorld(
        tuple(row for row, _ in pairs), tuple(other for _, other in pairs), tuple(kept),
        tuple(row for row in judged[0] if row in words), tuple(judged[2]), null, first, second, tuple(prompts), words,
    )  # fmt: skip


def nearness(features: Tensor, real: Tensor) -> float:
    """Mean distance of features [N, F] to the nearest of real [M, F] over that of real ones to their nearest neighbour."""
    to_real = torch.cdist(features, real).amin(1).mean()
    among = torch.cdist(real, real)
    among.fill_diagonal_(float("inf"))
    return float(to_real / among.amin(1).mean().clamp_min(1e-12))
