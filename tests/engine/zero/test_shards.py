"""Masks over shards: what the ranks agree on is bit for bit what one process chooses from all scores."""

import pytest
import torch
import torch.distributed as dist
from pecker_kernels import MaskError, Piece, SaliencyMask, SaliencyScores, ScoreError, Shards
from ranks import run_ranks

SHAPES = {"a": (7, 5), "b": (3,), "c": (4, 3, 3, 3), "d": (33, 17), "e": ()}


def gradients(seed, kind):
    g = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    if kind == "ties":  # few different values, many zeros
        found = {name: (2 * t).round() / 2 for name, t in found.items()}
    return found


def contiguous(rank, world, padding=3):
    """ZeRO 1 and 2: a stretch of the whole model, padding behind it."""
    total = sum(torch.Size(s).numel() for s in SHAPES.values())
    length = -(-total // world) + padding
    low, high, first, pieces = rank * length, (rank + 1) * length, 0, []
    for name, shape in SHAPES.items():
        n = torch.Size(shape).numel()
        start, stop = max(low, first), min(high, first + n)
        if start < stop:
            pieces.append(Piece(name, start - first, stop - first, start - low))
        first += n
    return pieces, length


def by_tensor(rank, world):
    """ZeRO 3: a slice of every tensor, padded to the same length."""
    offset, pieces = 0, []
    for name, shape in SHAPES.items():
        n = torch.Size(shape).numel()
        size = -(-n // world)
        start, stop = min(n, rank * size), min(n, (rank + 1) * size)
        if start < stop:
            pieces.append(Piece(name, start, stop, offset))
        offset += size
    return pieces, offset


LAYOUTS = {"contiguous": contiguous, "by_tensor": by_tensor}
CASES = [
    {"density": 0.1},
    {"density": 0.5, "scope": "tensor"},
    {"threshold": 0.7},
    {"density": 0.3, "structure": "row"},
    {"density": 0.2, "structure": "tile", "tile": (4, 4)},
    {"density": 0.4, "structure": "row", "scope": "tensor"},
    {"density": 0.5, "structure": "tensor"},
]


def whole_scores(reduction, kind, contrast):
    params = {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}
    scores = SaliencyScores(params.items(), reduction=reduction)
    for seed in (0, 1):
        scores.add(list(gradients(seed, kind).values()))
    if contrast:
        retain = SaliencyScores(params.items(), reduction="square")
        retain.add(list(gradients(5, "plain").values()))
        scores.contrast_(retain)
    return scores


def sharded_masks(rank, world, layout, reduction, kind, contrast):
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    pieces, length = LAYOUTS[layout](rank, world)
    shards = Shards(SHAPES, pieces, length)

    def vector(seed, kind):
        found = torch.full((length,), 99.0)  # padding must not count
        for name, t in gradients(seed, kind).items():
            shards.scatter_(found, name, t)
        return found

    scores = shards.scores("cpu", reduction)
    for seed in (0, 1):
        scores.add([vector(seed, kind)])
    if contrast:
        retain = shards.scores("cpu", "square")
        retain.add([vector(5, "plain")])
        shards.contrast_(scores, retain)
    masks = []
    for case in CASES:
        mask = shards.mask(scores, **case)
        local = shards.cut(mask)
        assert local.count == sum(int(part.sum()) for n in SHAPES for _, part in shards.owned(n, mask.bool(n)))
        masks.append((mask.digest, mask.threshold))
    return masks


@pytest.mark.parametrize(
    ("world", "layout", "reduction", "kind", "contrast"),
    [(1, "contiguous", "sum", "ties", False), (2, "contiguous", "sum", "ties", False), (2, "by_tensor", "abs", "plain", True),
     (4, "by_tensor", "sum", "ties", True), (4, "contiguous", "square", "plain", False)],
)  # fmt: skip
def test_masks_over_shards_equal_the_mask_of_one_process(world, layout, reduction, kind, contrast):
    scores = whole_scores(reduction, kind, contrast)
    expected = [SaliencyMask.from_scores(scores, **case) for case in CASES]
    for masks in run_ranks(world, sharded_masks, world, layout, reduction, kind, contrast):
        assert masks == [(mask.digest, mask.threshold) for mask in expected]


def failing(rank, world):
    dist.init_process_group("gloo", rank=rank, world_size=world)
    pieces, length = contiguous(rank, world)
    shards = Shards(SHAPES, pieces, length)
    scores = shards.scores("cpu")
    vector = torch.ones(length)
    if rank == 1:
        vector[0] = torch.nan
    scores.add([vector])
    try:
        shards.mask(scores, density=0.5)
    except ScoreError as error:
        return str(error)


def test_a_nan_on_one_rank_is_every_ranks_error():
    first, second = run_ranks(2, failing, 2)
    assert first == second
    assert first.startswith("rank 1: scores of 'd' hold NaN or inf")


def gathered(rank, world):
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for layout in LAYOUTS.values():
        pieces, length = layout(rank, world)
        shards = Shards(SHAPES, pieces, length)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float64):
            vector = torch.zeros(length, dtype=dtype)
            for name, t in gradients(0, "plain").items():
                shards.scatter_(vector, name, t.mul(-1) if dtype != torch.uint8 else t.abs())
            if dtype == torch.float32:
                vector[0] = -0.0 if rank == 0 else vector[0]
            for name in SHAPES:
                found[name, str(dtype), layout.__name__] = shards.gather(vector, name).clone()
    return found


def test_gathering_keeps_every_bit():
    for found in run_ranks(2, gathered, 2):
        for (name, kind, _), t in found.items():
            dtype = getattr(torch, kind.removeprefix("torch."))
            whole = gradients(0, "plain")[name]
            expected = (whole.abs() if dtype == torch.uint8 else whole.mul(-1)).to(dtype)
            if name == "a" and dtype == torch.float32:
                assert str(float(t.view(-1)[0])) == "-0.0"
                expected.view(-1)[0] = -0.0
            assert torch.equal(t, expected)


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece("a", 0, 36, 0)],  # longer than the tensor
        [Piece("a", 0, 4, 0), Piece("b", 0, 3, 3)],  # one over the other
        [Piece("z", 0, 1, 0)],
        [Piece("a", 0, 10, 95)],  # behind the end
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces):
    with pytest.raises(MaskError, match="does not fit"):
        Shards(SHAPES, pieces, 100)


@pytest.mark.parametrize("reduction", ["sum", "abs", "square"])
def test_gradients_that_come_in_parts_score_as_whole_ones(reduction):
    params = {"a": torch.zeros(6, 5, requires_grad=True)}
    whole, parts = (SaliencyScores(params.items(), reduction=reduction) for _ in range(2))
    for seed in (0, 1):
        g = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        whole.add([g])
        for start, stop in ((0, 7), (7, 8), (8, 30)):
            parts.add_part("a", start, g.view(-1)[start:stop])
        parts.counted()
    assert parts.accumulations == whole.accumulations == 2
    assert torch.equal(dict(parts.accumulators())["a"], dict(whole.accumulators())["a"])
    with pytest.raises(ValueError, match="are not in 'a'"):
        parts.add_part("a", 29, torch.zeros(2))
