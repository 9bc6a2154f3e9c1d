"""Drawn shapes: each picture is a function of what it shows and its index, and looks like it; captions are split cleanly."""

import collections
import itertools

import pytest
import torch

from pecker_fast.data import shapes
from pecker_fast.errors import DataError

EVERY = shapes.combinations()


def named(text: str) -> dict[str, str]:
    words = text.replace(",", " ").replace(":", " ").split()
    return {
        key: next(w for w in words if w in group) for key, group in shapes.ATTRIBUTES.items() if set(group) & set(words)
    }


def test_a_picture_depends_on_its_words_index_and_seed_alone() -> None:
    words, index = EVERY[::25], torch.arange(100, 115)
    whole = shapes.render(words, index, seed=3)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    torch.random.manual_seed(77)
    assert torch.equal(shapes.render(words[order], index[order], seed=3, batch=4), whole[order])
    assert not torch.equal(shapes.render(words, index + 1, seed=3), whole)
    assert not torch.equal(shapes.render(words, index, seed=4), whole)
    assert shapes.render(words[:0], index[:0]).shape == (0, 3, 32, 32)
    assert whole.dtype == torch.float32
    assert -1 <= whole.min() < whole.max() <= 1


def test_every_word_is_visible() -> None:
    images = shapes.render(EVERY, torch.arange(len(EVERY)))
    corner = images[:, :, 0, 0]
    paper = 2 * torch.tensor(shapes.BACKGROUNDS)[EVERY[:, 2]] - 1
    assert (corner - paper).abs().max() <= 2 * shapes.SHADE_JITTER + 1e-6
    ink = 2 * torch.tensor(shapes.COLOURS)[EVERY[:, 1]] - 1
    mask = (images - corner[:, :, None, None]).abs().sum(1) > 0.3
    weight = mask / mask.sum((1, 2), keepdim=True)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    x, y = (weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)
    for row, (u, v) in enumerate(zip(x.tolist(), y.tolist())):
        distance = [(u - a) ** 2 + (v - b) ** 2 for a, b in shapes.POSITIONS]
        assert distance.index(min(distance)) == EVERY[row, 3]
    difference = (images - corner[:, :, None, None]).abs().sum(1).flatten(1)
    heart = images.flatten(2)[torch.arange(len(images)), :, difference.argmax(1)]  # a pixel all inside the shape
    assert (heart - ink).abs().max() <= 2 * shapes.SHADE_JITTER + 1e-6


def test_shapes_differ_by_their_area_and_edges_are_soft() -> None:
    words = torch.tensor([[s, 0, 0, 4] for s in range(5)])
    cover = (shapes.render(words, torch.zeros(5, dtype=torch.long), size=128)[:, 0] + 1).mean((1, 2))
    assert len({round(float(c), 3) for c in cover}) == 5
    picture = shapes.render(words[:1], torch.zeros(1, dtype=torch.long))[0, 0]
    assert ((picture > picture.min() + 0.1) & (picture < picture.max() - 0.1)).any()


def test_splits_are_even_and_share_neither_captions_nor_combinations() -> None:
    train, held = shapes.captions("train"), shapes.captions("held_out")
    assert len(set(train)) == len(train) == 600
    assert len(set(held)) == len(held) >= 1000
    assert not set(train) & set(held)
    full = [tuple(named(text).items()) for text in train if len(named(text)) == 4]
    assert not set(full) & {tuple(named(text).items()) for text in held}
    for split, least in ((train, 100), (held, 200)):
        for key in ("shape", "colour"):
            counts = collections.Counter(named(text)[key] for text in split)
            assert set(counts) == set(shapes.ATTRIBUTES[key])
            assert min(counts.values()) == max(counts.values()) >= least
        for key in ("background", "position"):
            counts = collections.Counter(named(text).get(key) for text in split)
            counts.pop(None, None)
            assert max(counts.values()) <= 1.1 * min(counts.values())
    with pytest.raises(DataError, match="train or held_out"):
        shapes.captions("test")


@pytest.mark.parametrize("template", range(len(shapes.TEMPLATES)))
def test_a_caption_names_what_it_was_made_of_and_nothing_else(template: int) -> None:
    for words in EVERY[::17].tolist():
        found = named(shapes.caption(words, template))
        truth = {key: group[i] for (key, group), i in zip(shapes.ATTRIBUTES.items(), words)}
        assert found == {key: truth[key] for key in found}
        assert {"shape", "colour"} <= set(found)
        assert template >= len(shapes.FULL_TEMPLATES) or len(found) == 4


def test_no_word_belongs_to_two_attributes() -> None:
    words = list(itertools.chain(*shapes.ATTRIBUTES.values()))
    assert len(set(words)) == len(words)
    assert [len(shapes.COLOURS), len(shapes.BACKGROUNDS), len(shapes.POSITIONS), len(shapes.OUTLINES)] == [5, 3, 5, 5]
