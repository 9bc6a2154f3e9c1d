import json
import os

import hypothesis.strategies as st
import pecker_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from kernel_gates import small_model, snapshot
from pecker_kernels import reference

SHAPES = ((5, 3, 2, 2), (7,), (), (4, 9), (0, 3), (1, 1), (13, 2))


def make_scores(seed, levels=None):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i, shape in enumerate(SHAPES):
        score = torch.rand(shape, generator=generator)
        out[f"t{i}"] = score if levels is None else (score * levels).floor()
    return out


def truth(scores, k, structure, tile):
    values = list(scores.values())
    keep = (
        reference.keep_top_k(values, k)
        if structure == "element"
        else reference.keep_best_blocks(values, k, structure, tile)
    )
    return dict(zip(scores, keep))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    density=st.floats(0.02, 1.0),
    structure=st.sampled_from(["element", "row", "tile", "tensor"]),
    tile=st.sampled_from([(2, 3), (128, 128), (1, 1), (4, 1)]),
    # Few levels of small integers: many ties, and means that are exact whatever the order of summation.
    levels=st.sampled_from([1, 2, 4]),
)
def test_global_masks_follow_the_rule(seed, density, structure, tile, levels):
    scores = make_scores(seed, levels)
    total = sum(s.numel() for s in scores.values())
    k = round(total * density)
    if k == 0:
        return
    mask = pk.SaliencyMask.from_scores(scores, density=density, structure=structure, tile=tile)
    expected = truth(scores, k, structure, tile)
    assert all(torch.equal(mask.bool(name), expected[name]) for name in scores)
    assert mask.count == sum(int(e.sum()) for e in expected.values()) >= k
    assert mask.total == total
    if structure == "element":
        assert mask.count == k


@pytest.mark.parametrize("structure", ["element", "row", "tile", "tensor"])
def test_scope_tensor_applies_the_density_to_each(structure):
    scores = make_scores(3)
    mask = pk.SaliencyMask.from_scores(scores, density=0.4, structure=structure, scope="tensor", tile=(2, 3))
    for name, score in scores.items():
        expected = truth({name: score}, round(score.numel() * 0.4), structure, (2, 3))[name]
        assert torch.equal(mask.bool(name), expected)
    assert mask.threshold is None


def test_rows_of_matrices_are_output_channels_and_of_vectors_single_weights():
    scores = {"w": torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([2.0, 0.5, 0.1])}
    mask = pk.SaliencyMask.from_scores(scores, density=3 / 9, structure="row")
    assert mask.bool("w").tolist() == [[False, False], [True, True], [False, False]]
    assert mask.bool("b").tolist() == [True, False, False]
    assert mask.threshold == 1.5


def test_threshold_keeps_at_or_above():
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([[0.2, 0.0]])}
    cut = float(torch.tensor(0.2))
    mask = pk.SaliencyMask.from_scores(scores, threshold=cut)
    assert mask.bool("a").tolist() == [False, True, True]
    assert mask.bool("b").tolist() == [[True, False]]
    assert (mask.count, mask.threshold) == (3, cut)
    rows = pk.SaliencyMask.from_scores(scores, threshold=0.1, structure="row")
    assert rows.bool("b").tolist() == [[True, True]]


def test_density_one_keeps_all_and_full_is_the_same():
    scores = make_scores(0)
    for structure in ("element", "row", "tile", "tensor"):
        mask = pk.SaliencyMask.from_scores(scores, density=1, structure=structure)
        assert mask.density == 1.0
        assert mask == pk.SaliencyMask.full(scores)


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_density_out_of_range(density):
    with pytest.raises(pk.MaskError, match="density must be in"):
        pk.SaliencyMask.from_scores(make_scores(0), density=density)


def test_argument_refusals():
    scores = make_scores(0)
    for kwargs, message in (
        ({}, "exactly one"),
        ({"density": 0.5, "threshold": 0.5}, "exactly one"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": 0.5, "scope": "tensor"}, "goes with density"),
        ({"density": 0.5, "scope": "layer"}, "unknown scope"),
        ({"density": 0.5, "structure": "block"}, "unknown structure"),
        ({"density": 0.5, "tile": (0, 3)}, "tile must be"),
        ({"density": 1e-9}, "keeps none"),
        ({"threshold": 9.0}, "keeps none"),
    ):
        with pytest.raises(pk.MaskError, match=message):
            pk.SaliencyMask.from_scores(scores, **kwargs)
    with pytest.raises(pk.ScoreError, match="negative"):
        pk.SaliencyMask.from_scores({"a": torch.tensor([-1.0, 1.0])}, density=0.5)


def test_random_masks_have_the_same_count_and_depend_on_the_seed():
    model = small_model()
    model[0].bias.requires_grad_(False)
    scores = pk.SaliencyScores(model.named_parameters())
    model[2].weight.grad = torch.randn(13, 5)
    scores.accumulate()
    salient = pk.SaliencyMask.from_scores(scores, density=0.3)
    a, b, c = (pk.SaliencyMask.random(model.named_parameters(), 0.3, seed=s) for s in (0, 0, 1))
    assert a == b
    assert a != c
    assert a.count == c.count == salient.count
    assert a.names == salient.names
    assert "0.bias" not in a.names
    for structure in ("row", "tile", "tensor"):
        mask = pk.SaliencyMask.random(model.named_parameters(), 0.3, structure=structure, tile=(4, 8))
        assert mask.count >= round(0.3 * mask.total)
        blocks = pk.SaliencyMask.from_scores(
            {n: mask.bool(n).float() for n in mask.names}, threshold=0.5, structure=structure, tile=(4, 8)
        )
        assert blocks == mask


def test_a_random_row_mask_does_not_favour_small_rows():
    shapes = {"wide": torch.empty(200, 50), "vector": torch.empty(10_000)}
    mask = pk.SaliencyMask.random(shapes, 0.2, structure="row")
    assert abs(mask.density_of("wide") - 0.2) < 0.1
    assert abs(mask.density_of("vector") - 0.2) < 0.1


def test_apply_sets_and_counts():
    model = small_model()
    mask = pk.SaliencyMask.random(model.named_parameters(), 0.4)
    before = snapshot(model)
    with torch.no_grad():
        mask.apply_(model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * mask.bool(name))
        assert mask.count_of(name) == int(mask.bool(name).sum())
        assert mask.density_of(name) == mask.count_of(name) / p.numel()
    assert sum(mask.count_of(n) for n in mask.names) == mask.count
    other = pk.SaliencyMask.random(model.named_parameters(), 0.4, seed=9)
    union, both = mask | other, mask & other
    for name in mask.names:
        assert torch.equal(union.bool(name), mask.bool(name) | other.bool(name))
        assert torch.equal(both.bool(name), mask.bool(name) & other.bool(name))
    assert union.count + both.count == mask.count + other.count
    assert mask.union(mask) == mask.intersection(mask) == mask
    with pytest.raises(pk.MaskError, match="no tensor 'other'"):
        mask.apply_({"other": torch.ones(3)})
    with pytest.raises(pk.MaskError, match="'scale' has shape"):
        mask.apply_([("scale", torch.ones(3))])


def test_check_names_the_first_mismatch():
    model = small_model()
    mask = pk.SaliencyMask.full(model.named_parameters())
    mask.check(model.named_parameters())
    named = dict(model.named_parameters())
    with pytest.raises(pk.MaskError, match=r"'2\.bias' has shape"):
        mask.check({**named, "2.bias": torch.ones(4)})
    with pytest.raises(pk.MaskError, match="'new' is not in the mask"):
        mask.check({**named, "new": torch.ones(4)})
    del named["1.weight"]
    with pytest.raises(pk.MaskError, match=r"'1\.weight' that is not in the model"):
        mask.check(named)


@pytest.fixture
def saved(tmp_path):
    mask = pk.SaliencyMask.from_scores(make_scores(1), density=0.3, provenance={"method": "test", "seed": "7"})
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    return mask, path


def test_file_round_trip(saved, tmp_path):
    mask, path = saved
    back = pk.SaliencyMask.load(path)
    assert back == mask
    for key in (
        "names",
        "shapes",
        "structure",
        "scope",
        "tile",
        "threshold",
        "density",
        "count",
        "total",
        "provenance",
    ):
        assert getattr(back, key) == getattr(mask, key)
    assert os.listdir(tmp_path) == ["mask.safetensors"]
    # 1 bit per weight: everything beyond the packed bytes is the header.
    assert path.stat().st_size < sum(b.numel() for b in mask.bits.values()) + 2048


def damage(path, change_tensors=None, **metadata):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), "pt") as f:
        meta, tensors = json.loads(f.metadata()["pecker"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    for key, value in metadata.items():
        if value is None:
            del meta[key]
        else:
            meta[key] = value
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, str(path), metadata={"pecker": json.dumps(meta)})


@pytest.mark.parametrize("stored", [None, {}, {"pecker": "{"}, {"pecker": "[]"}, {"pecker": '{"format": 1}'}])
def test_damaged_metadata_is_refused(saved, stored):
    from safetensors.torch import save_file

    _, path = saved
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, str(path), metadata=stored)
    with pytest.raises(pk.MaskError, match="metadata"):
        pk.SaliencyMask.load(path)


def test_equal_masks_make_equal_files(saved, tmp_path):
    _, path = saved
    for i in range(3):
        pk.SaliencyMask.load(path).save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes(), i


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


def _stray(tensors):
    tensors["t1"][-1] |= 0x80


def _flip(tensors):
    tensors["t0"][0] ^= 1


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop("t3"), {}, "'t3' is listed in 'shapes' but missing"),
        (_set("extra", torch.zeros(1, dtype=torch.uint8)), {}, "'extra' has no entry"),
        (_set("t1", torch.zeros(2, dtype=torch.uint8)), {}, r"'t1': expected uint8 \[1\]"),
        (_set("t1", torch.zeros(1)), {}, r"'t1': expected uint8 \[1\]"),
        (_stray, {}, "'t1' has ones in the padding"),
        (_flip, {}, "metadata says"),
        (None, {"version": "2"}, "version '2'"),
        (None, {"format": "other"}, "not a mask file"),
        (None, {"shapes": None}, "'shapes' is missing"),
        (None, {"shapes": "{"}, "not valid JSON"),
        (None, {"shapes": "[1]"}, "not \\[name, shape\\]"),
        (None, {"shapes": '[["t0", [-1]]]'}, "not a size"),
        (None, {"shapes": '[["t0", [0, 99999999999999999999]]]'}, "more weights than"),
        (None, {"shapes": "[" * 100_000}, "not valid JSON"),
        (None, {"count": "3"}, "metadata says 3"),
        (None, {"density": "0.9"}, "'density' is 0.9"),
        (None, {"structure": "blob"}, "unknown structure"),
        (None, {"tile": "[1]"}, "'tile' is not a pair"),
        (None, {"threshold": '"x"'}, "'threshold' is not a number"),
        (None, {"provenance": "[]"}, "'provenance'"),
    ],
)
def test_damaged_files_are_refused_and_named(saved, change, metadata, message):
    _, path = saved
    damage(path, change, **metadata)
    with pytest.raises(pk.MaskError, match=message):
        pk.SaliencyMask.load(path)


def test_truncated_foreign_and_missing_files(saved, tmp_path):
    _, path = saved
    data = path.read_bytes()
    for cut in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(pk.MaskError, match="not a readable safetensors file"):
            pk.SaliencyMask.load(path)
    with pytest.raises(pk.MaskError, match="there is no mask file"):
        pk.SaliencyMask.load(tmp_path / "none")


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, tmp_path):
    mask, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        mask.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_mask_cannot_be_built_from_wrong_bits():
    with pytest.raises(pk.MaskError, match="'a'"):
        pk.SaliencyMask({"a": torch.zeros(2, dtype=torch.uint8)}, {"a": (3,)})
    with pytest.raises(pk.MaskError, match="padding"):
        pk.SaliencyMask({"a": torch.tensor([255], dtype=torch.uint8)}, {"a": (3,)})
