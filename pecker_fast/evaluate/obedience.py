"""Which words of their prompts do samples obey: the word that was to be forgotten, its cover, and all the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate.classes import Sampler
from pecker_fast.evaluate.drawing import Prompt, dealt, drawn, drawn_with_seeds
from pecker_fast.evaluate.intervals import Share, figures


class WordJudge(Protocol):
    """A judge that sees one word of each attribute in an image. No word belongs to two attributes."""

    attributes: dict[str, tuple[str, ...]]

    def expected(self, prompt: str) -> Mapping[str, str]:
        """The word that `prompt` names of each attribute; attributes it does not name are left out."""

    def seen(self, images: Tensor) -> Mapping[str, Sequence[str]]:
        """The word of each attribute seen in each of `images` [N, C, H, W]."""


class _Asked(NamedTuple):
    """What a prompt asks for, by attribute: words to forget, what may stand in their place, words to obey."""

    row: int
    forgotten: dict[str, str]
    wanted: dict[str, str]
    other: dict[str, str]


def word_figures(
    sampler: Sampler,
    judge: WordJudge,
    forget: Sequence[Prompt],
    cover: Sequence[str],
    retain: Sequence[Prompt],
    samples: int,
    seed: int,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Judge `samples` images of forget prompts and `samples` of retain prompts, prompts dealt in turn.

    The forgotten words of a forget prompt are those its cover prompt does not name; the word that the cover prompt has
    of the same attribute is wanted in its place. Prompts in which the judge has nothing to look for (a forget prompt
    without a forgotten word, a retain prompt without a word) are not drawn.

    Args:
        sampler: draws images for indices of prompts; called with the same indices and seeds every time: two models see
            equal noise.
        judge: sees the words.
        forget: prompts that name what was to be forgotten.
        cover: the prompt that takes the place of each forget prompt, aligned with `forget`; never drawn.
        retain: prompts that must stay.
        samples: images of each group.
        seed: any whole number.
        seeds: in the place of both: an image of every prompt with each of these, equal noise for all prompts.

    Returns:
        `ua`: 1 − share of forget samples in which a forgotten word is seen.
        `cover_rate`: share of forget samples in which all wanted words are seen, of those that have any.
        `obeyed`: of the other words of the forget prompts, by attribute, the share that is seen; `obeyed_all`: share of
        forget samples in which all of theirs are.
        `retain_obeyed`: the same for retain prompts; `retain_accuracy`: share of retain samples with all words seen.
        `ira`, `cra` (after UnlearnCanvas' in-domain and cross-domain retain accuracy): share of the words of retain
        samples that are seen, of the attributes that lose a word (the forgotten words themselves aside) and of all
        other attributes.
        `per_class`: by word, the share of samples asked for it in which it is seen: forgotten words in forget samples,
        all others in retain samples.
        `samples`: as given. `unjudged`: forget and retain prompts that were not drawn. `intervals`: 95 % of each share.
        A share of nothing is None.

    Raises:
        RecipeError: no samples, covers that do not pair, or nothing for the judge to look for in a group.
        ModelError: the judge does not see every attribute in every image.
        PeckerError: the sampler's images are not finite or not one per prompt.
    """
    if len(cover) != len(forget):
        raise RecipeError(f"cover: one prompt for each of the {len(forget)} forget prompts, got {len(cover)}")
    if seeds is None and samples < 1:
        raise RecipeError(f"evaluate: needs samples ≥ 1, got {samples}")
    asked = [_split(judge, prompt, of_cover) for prompt, of_cover in zip(forget, cover)]
    lost = [one for one in asked if one.forgotten]
    kept = [_Asked(p.row, {}, {}, words) for p in retain if (words := dict(judge.expected(p.text)))]
    if not lost:
        raise RecipeError("forget: the judge has no word that a forget prompt names and its cover prompt does not")
    if not kept:
        raise RecipeError("retain: the judge has no word that a retain prompt names")

    gone = {(attribute, word) for one in lost for attribute, word in one.forgotten.items()}
    in_domain = {attribute for attribute, _ in gone}
    shares: dict[str, Any] = {key: Share() for key in ("ua", "cover_rate", "obeyed_all", "retain_accuracy")}
    shares |= {key: defaultdict(Share) for key in ("obeyed", "retain_obeyed", "per_class")}
    domains = {True: Share(images=0), False: Share(images=0)}

    for one, seen in _judged(sampler, judge, lost, samples, seed, "forget", seeds):
        shares["ua"].add(all(seen[a] != word for a, word in one.forgotten.items()))
        for attribute, word in one.forgotten.items():
            shares["per_class"][word].add(seen[attribute] == word)
        _count(shares["cover_rate"], one.wanted, seen)
        _count(shares["obeyed_all"], one.other, seen, shares["obeyed"])
    for one, seen in _judged(sampler, judge, kept, samples, seed, "retain", seeds):
        _count(shares["retain_accuracy"], one.other, seen, shares["retain_obeyed"])
        counted = {(a, word): seen[a] == word for a, word in one.other.items() if (a, word) not in gone}
        for (_, word), hit in counted.items():
            shares["per_class"][word].add(hit)
        for inside, domain in domains.items():
            hits = [hit for (attribute, _), hit in counted.items() if (attribute in in_domain) is inside]
            for hit in hits:
                domain.add(hit)
            domain.images = (domain.images or 0) + bool(hits)

    for key in ("obeyed", "retain_obeyed", "per_class"):
        shares[key] = dict(sorted(shares[key].items()))
    return {
        "protocol": "classes",
        **figures(shares | {"ira": domains[True], "cra": domains[False]}),
        "samples": samples if seeds is None else len(lost) * len(seeds),
        "unjudged": {"forget": len(forget) - len(lost), "retain": len(retain) - len(kept)},
    }


def _split(judge: WordJudge, prompt: Prompt, cover: str) -> _Asked:
    words, of_cover = judge.expected(prompt.text), judge.expected(cover)
    forgotten = {a: word for a, word in words.items() if of_cover.get(a) != word}
    wanted = {a: of_cover[a] for a in forgotten if a in of_cover}
    return _Asked(prompt.row, forgotten, wanted, {a: word for a, word in words.items() if a not in forgotten})


def _judged(
    sampler: Sampler, judge: WordJudge, asked: Sequence[_Asked], samples: int, seed: int, group: str,
    seeds: Sequence[int] | None,
) -> Iterable[tuple[_Asked, dict[str, str]]]:  # fmt: skip
    """What was asked and what is seen, by attribute, of each of `samples` images."""
    if seeds is None:
        order = dealt(len(asked), samples, seed, group)
        blocks = drawn(sampler, torch.tensor([one.row for one in asked])[order], seed, group)
    else:
        order = torch.arange(len(asked)).repeat_interleave(len(seeds))
        rows = [asked[place].row for place in order.tolist()]
        blocks = drawn_with_seeds(sampler, rows, 1, [*seeds] * len(asked), group)
    done = 0
    for images in blocks:
        seen = judge.seen(images)
        for attribute in judge.attributes:
            if len(seen.get(attribute, ())) != len(images):
                found = len(seen[attribute]) if attribute in seen else "none"
                raise ModelError(f"the judge was given {len(images)} images and saw the {attribute} of {found}")
        for i, place in enumerate(order[done : done + len(images)].tolist()):
            yield asked[place], {attribute: seen[attribute][i] for attribute in judge.attributes}
        done += len(images)


def _count(
    share: Share, words: Mapping[str, str], seen: Mapping[str, str], each: dict[str, Share] | None = None
) -> None:
    """One more for `share` if all `words` are seen, and for `each` attribute; nothing where there is no word to see."""
    if words:
        share.add(all(seen[attribute] == word for attribute, word in words.items()))
    for attribute, word in words.items():
        if each is not None:
            each[attribute].add(seen[attribute] == word)
