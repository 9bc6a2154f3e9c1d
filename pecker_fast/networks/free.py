"""Free conditions: vectors in the place of a network's own conditions, for a gradient to move.

Adversary and audit look for conditions that still draw what was forgotten. A code past a network's own conditions stands for
"vector k in the place of condition c": codes are int64 as conditions are, so batches are cut, sharded and stored as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIXED = -1  # in a map of places: the token stays


@contextmanager
def free_rows(unet: nn.Module, vectors: Tensor | None) -> Iterator[None]:
    """Inside, class labels past the network's embedding table are rows of `vectors` [K, D]; None = no such labels."""
    if vectors is None:
        yield
        return
    network: Any = getattr(unet, "base", unet)
    table = network.class_embedding

    def looked_up(labels: Tensor) -> Tensor:
        count = table.weight.shape[0]
        own = F.embedding(labels.clamp(max=count - 1), table.weight)
        free = F.embedding((labels - count).clamp(min=0), vectors).to(own.dtype)
        return torch.where((labels < count).unsqueeze(1), own, free)

    table.__dict__["forward"] = looked_up
    try:
        yield
    finally:
        del table.__dict__["forward"]


def free_tokens(embeds: Tensor, vectors: Tensor, places: Tensor, which: Tensor) -> Tensor:
    """Text embeddings [N, L, D] in which tokens are replaced, [N, L, D].

    vectors: [K, k, D]. places: [N, L], which of the k tokens stands at each position, `FIXED` = the prompt's own. which: [N],
    the vector of each row; negative = none.
    """
    at = places.clamp(min=0)
    free = vectors[which.clamp(min=0).unsqueeze(1), at].to(embeds.dtype)  # [N, L, D]
    moved = (places != FIXED) & (which >= 0).unsqueeze(1)
    return torch.where(moved.unsqueeze(2), free, embeds)


def token_places(ids: Tensor, spans: Sequence[tuple[int, int] | None], tokens: int) -> Tensor:
    """The map of places [P, L] for `tokens` free tokens in prompts of token ids [P, L].

    spans: [start, end) of the concept in each prompt; None = it is not named. Free tokens stand where the concept stands, over
    again where it is longer; where it is shorter, or not named, the others stand at the end of the row. Attention asks no
    order of the tokens it reads.
    """
    length = ids.shape[1]
    places = torch.full(ids.shape, FIXED, dtype=torch.int64)
    for row, span in enumerate(spans):
        inside = list(range(*span)) if span is not None else []
        rest = [position for position in range(length - 1, 0, -1) if position not in inside]
        slots = inside + rest[: max(0, tokens - len(inside))]
        for i, position in enumerate(slots):
            places[row, position] = i % tokens
    return places


def named_span(ids: Tensor, other: Tensor) -> tuple[int, int] | None:
    """[start, end) of what prompt `ids` [L] names and `other` [L] does not, the same caption with the cover's word; both begin
    with a start token and end, before the padding, with an end token. None where they are equal."""
    ours, theirs = _content(ids), _content(other)
    if ours == theirs:
        return None
    start = 0
    while start < min(len(ours), len(theirs)) and ours[start] == theirs[start]:
        start += 1
    tail = 0
    while tail < min(len(ours), len(theirs)) - start and ours[-1 - tail] == theirs[-1 - tail]:
        tail += 1
    end = len(ours) - tail
    return (start, end) if end > start else (max(1, start - 1), max(2, start))  # only left out: the word before


def _content(ids: Tensor) -> list[int]:
    """Token ids up to the last one that is not the padding's, and one of those: the end token pads in CLIP's first tokenizer."""
    values = ids.tolist()
    while len(values) > 1 and values[-1] == values[-2]:
        values.pop()
    return values
