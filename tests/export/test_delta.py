"""Delta files: base + delta is the result, bit for bit; everything else is refused in one line."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pecker_fast import files
from pecker_fast.errors import DataError, ModelError, OutputError, PeckerError
from pecker_fast.export.delta import apply_delta, apply_to_folder, delta_of_folders, hash_of, write_delta

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
SHAPES = ((), (0,), (1,), (7,), (8,), (3, 5), (4, 0, 2), (300,), (2, 16, 9))
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern, NaN payloads too."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and raw(a[name]) == raw(b[name]) for name in b
    )


def rows(stats) -> tuple[int, int]:
    return stats.changed_tensors, stats.changed_weights


def write(base, result, path, **metadata):
    return write_delta(base, result, path, base_sha256=hash_of(base), metadata=metadata)


@given(st.data())
@QUICK
def test_base_and_delta_make_the_result(tmp_path, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    base, result, changes = {}, {}, 0
    for i in range(data.draw(st.integers(0, 4))):
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
        old = random_bits(generator, shape, dtype)
        share = data.draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]))
        new = torch.where(torch.rand(shape, generator=generator) < share, random_bits(generator, shape, dtype), old)
        width = dtype.itemsize
        pairs = [(raw(old)[j : j + width], raw(new)[j : j + width]) for j in range(0, old.numel() * width, width)]
        changes += sum(x != y for x, y in pairs)
        base[f"layer.{i}:mask"], result[f"layer.{i}:mask"] = old, new
    stats = write(base, result, tmp_path / "delta.safetensors")
    assert same_bits(apply_delta(tmp_path / "delta.safetensors", base), result)
    assert stats.changed_weights == changes
    assert stats.changed_tensors == sum(raw(base[name]) != raw(result[name]) for name in base)
    if same_bits(base, result):
        assert files.read_tensors(tmp_path / "delta.safetensors")[0] == {}


@given(st.data())
@QUICK
def test_tensors_may_come_go_and_change_their_kind(tmp_path, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def model() -> dict[str, torch.Tensor]:
        names = data.draw(st.sets(st.sampled_from("abcd")))
        kinds = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
        return {name: random_bits(generator, *data.draw(kinds)) for name in sorted(names)}

    base, result = model(), model()
    write(base, result, tmp_path / "delta.safetensors")
    assert same_bits(apply_delta(tmp_path / "delta.safetensors", base), result)


def test_minus_zero_and_nan_payloads_count(tmp_path):
    nan = torch.tensor([0x7FC00000, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    base = {"zero": torch.tensor([0.0, 0.0]), "nan": nan}
    path = tmp_path / "delta.safetensors"
    assert rows(write(base, {**base, "nan": nan.clone()}, path)) == (0, 0)
    assert rows(write(base, {"zero": torch.tensor([0.0, -0.0]), "nan": other}, path)) == (2, 2)
    assert same_bits(apply_delta(path, base), {"zero": torch.tensor([0.0, -0.0]), "nan": other})


@pytest.mark.parametrize(
    ("share", "form", "size"),
    [(0.001, "indices", 80_000 * 0.001 * 8), (0.3, "mask", 80_000 * (1 / 8 + 0.3 * 4)), (1, "whole", 80_000 * 4)],
)
def test_the_smallest_form_is_taken(tmp_path, share, form, size):
    base = {"w": torch.zeros(80_000)}
    result = {"w": (torch.arange(80_000) < round(80_000 * share)).float()}
    stats = write(base, result, tmp_path / "delta.safetensors")
    parts, header = files.read_tensors(tmp_path / "delta.safetensors")
    assert json.loads(header["tensors"])["w"][2] == form
    assert sum(part.numel() * part.element_size() for part in parts.values()) == size
    assert stats.delta_bytes == (tmp_path / "delta.safetensors").stat().st_size
    assert (stats.weights, stats.result_bytes) == (80_000, 320_000)


def test_the_file_says_what_it_is(tmp_path):
    base, result = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    write(base, result, tmp_path / "delta.safetensors", recipe="mine")
    header = files.read_tensors(tmp_path / "delta.safetensors")[1]
    assert (header["format"], header["version"]) == ("pecker-fast delta", "2")
    assert (header["base_sha256"], header["result_sha256"]) == (hash_of(base), hash_of(result))
    assert json.loads(header["metadata"]) == {"recipe": "mine"}
    with pytest.raises(DataError, match="base_sha256"):
        write_delta(base, result, tmp_path / "other.safetensors", base_sha256=hash_of(result))
    with pytest.raises(OutputError, match="metadata"):
        write(base, result, tmp_path / "other.safetensors", note="x" * (files.MAX_HEADER_BYTES // 2))
    assert not (tmp_path / "other.safetensors").exists()


BASE = {"many": torch.arange(100.0), "few": torch.arange(500.0), "all": torch.arange(4.0), "kept": torch.arange(3.0)}
RESULT = {
    "many": torch.where(torch.arange(100) % 3 == 0, -1.0, BASE["many"]),
    "few": torch.where(torch.arange(500) % 200 == 7, -1.0, BASE["few"]),
    "all": BASE["all"] + 9,
    "kept": BASE["kept"],
}


@pytest.fixture
def delta(tmp_path):
    """(path, tensors, header, list) of a delta that uses all four forms, and a function that writes it changed."""
    path = tmp_path / "delta.safetensors"
    write(BASE, RESULT, path)
    parts, header = files.read_tensors(path)
    listed = json.loads(header["tensors"])
    assert {name: entry[2] for name, entry in listed.items()} == {
        "many": "mask",
        "few": "indices",
        "all": "whole",
        "kept": "same",
    }

    def changed(new_parts=None, entries=None, drop=(), **new_header) -> Path:
        keep = {name: part for name, part in (parts | (new_parts or {})).items() if name not in drop}
        new_list = {name: entry for name, entry in (listed | (entries or {})).items() if name not in drop}
        head = header | {"tensors": json.dumps(new_list)} | new_header
        if "head_sha256" not in new_header:
            head["head_sha256"] = files.sha256_value({k: v for k, v in head.items() if k != "head_sha256"})
        files.write_tensors(path, keep, head)
        return path

    return path, parts, listed, changed


def refused(path: Path, base: dict, match: str) -> None:
    with pytest.raises(DataError, match=match) as error:
        apply_delta(path, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other",
    [
        {**BASE, "kept": torch.arange(3.0) + 1},
        {**BASE, "kept": torch.arange(3.0).half()},
        {**BASE, "kept": torch.arange(3.0)[None]},
        {**BASE, "extra": torch.ones(1)},
        {name: tensor for name, tensor in BASE.items() if name != "kept"},
        {("moved" if name == "kept" else name): tensor for name, tensor in BASE.items()},
        {},
    ],
)
def test_another_base_is_refused(delta, other):
    refused(delta[0], other, "another base")


def test_the_order_of_the_base_does_not_matter(delta):
    assert same_bits(apply_delta(delta[0], dict(reversed(BASE.items()))), RESULT)


def test_malformed_parts_are_refused(delta):
    _, parts, listed, changed = delta
    mask, values = parts["many:mask"], parts["many:values"]
    indices, huge = parts["few:indices"], 10**15

    def entry(name: str, dtype=None, shape=None, form=None) -> dict:
        old = listed[name]
        return {name: [dtype or old[0], old[1] if shape is None else shape, form or old[2]]}

    far = indices.clone()
    far[-1] = 500
    padded = mask.clone()
    padded[-1] |= 128
    cases = [
        ({"many:mask": mask[:-1]}, {}, "one bit per weight"),
        ({"many:mask": mask.to(torch.int32)}, {}, "one bit per weight"),
        ({"many:mask": padded}, {}, "beyond its last weight"),
        ({"many:mask": torch.zeros_like(mask)}, {}, "values for 0 places"),
        ({"many:values": values[:-1]}, {}, "places"),
        ({"many:values": values.half()}, {}, "no list of float32"),
        ({"many:values": values[None]}, {}, "no list of float32"),
        ({"few:indices": far}, {}, "out of range"),
        ({"few:indices": indices - indices[0] - 1}, {}, "out of range"),
        ({"few:indices": indices.flip(0)}, {}, "not increasing"),
        ({"few:indices": indices * 0}, {}, "not increasing"),
        ({"few:indices": indices.float()}, {}, "no list of int32"),
        ({"few:indices": indices[None]}, {}, "no list of int32"),
        ({"few:values": parts["few:values"][:-1]}, {}, "places"),
        ({"all:whole": parts["all:whole"][:-1]}, {}, "dtype and shape in its list"),
        ({"all:whole": parts["all:whole"].half()}, {}, "dtype and shape in its list"),
        ({"all:whole": parts["all:whole"] + 1}, {}, "not the one it promises"),
        ({"many:values": values + 1}, {}, "not the one it promises"),
        ({"stray": torch.ones(1)}, {}, "holds the unknown part stray"),
        ({}, entry("many", shape=[huge, huge]), "shape that the base has"),
        ({}, entry("few", shape=[huge]), "shape that the base has"),
        ({}, entry("kept", shape=[huge]), "shape that the base has"),
        ({}, entry("all", shape=[huge]), "dtype and shape in its list"),
        ({}, entry("kept", dtype="float16"), "shape that the base has"),
        ({}, entry("few", dtype="os"), "shape that the base has"),
        ({}, entry("few", shape=[-500]), "the entry of few"),
        ({}, entry("few", shape=["500"]), "the entry of few"),
        ({}, entry("few", shape=[True]), "the entry of few"),
        ({}, entry("few", form="pickle"), "the entry of few"),
        ({}, entry("few", form="mask"), "part few:"),
        ({}, {"few": ["float32", [500]]}, "the entry of few"),
        ({}, {"few": 3}, "the entry of few"),
        ({}, {"ghost": ["float32", [1], "same"]}, "shape that the base has"),
        ({}, {"ghost": ["float32", [1], "whole"]}, "lacks part ghost:whole"),
    ]
    for new_parts, entries, match in cases:
        refused(changed(new_parts, entries), BASE, match)
    for name in parts:
        refused(changed(drop=(name,)), BASE, f"lacks part {name}")
    refused(changed(drop=("kept",)), BASE, "not the one it promises")
    assert same_bits(apply_delta(changed(), BASE), RESULT)


def test_foreign_and_damaged_files_are_refused(delta, tmp_path):
    path, parts, _, changed = delta
    refused(changed(format="someone else's"), BASE, "not a delta file")
    refused(changed(version="3"), BASE, "version '3'")
    refused(changed(base_sha256="0"), BASE, "another base")
    refused(changed(result_sha256="0"), BASE, "not the one it promises")
    refused(changed(tensors="{"), BASE, "no JSON")
    refused(changed(tensors="[" * 100_000), BASE, "no JSON")
    refused(changed(tensors="[]"), BASE, "no JSON object")
    files.write_tensors(path, parts)
    refused(path, BASE, "not a delta file")
    content = changed().read_bytes()
    path.write_bytes(content[:-3])
    refused(path, BASE, "damaged")
    refused(tmp_path / "absent.safetensors", BASE, "absent")
    (tmp_path / "delta.pt").write_bytes(content)
    refused(tmp_path / "delta.pt", BASE, "pickle")


@pytest.mark.parametrize("version", ["1", "2"])
def test_notes_stand_under_a_hash(delta, version):
    """A card, a schedule or the list of classes that was changed after the delta was written; version 1 had no hash of them."""
    path, parts, _, changed = delta
    head = files.read_tensors(changed())[1]
    notes = json.dumps({"card": "another story"})
    files.write_tensors(path, parts, head | {"metadata": notes})
    refused(path, BASE, "head_sha256")
    for key in head.keys() - {"format"}:  # each under the hash, and the hash itself
        value = head[key]
        for other in (value[:-1], value.replace(value[len(value) // 2], "~")):
            files.write_tensors(path, parts, head | {key: other})
            refused(path, BASE, "damaged delta file")
    old = {key: value for key, value in head.items() if key != "head_sha256"} | {"version": version}
    files.write_tensors(path, parts, old)
    if version == "1":
        assert same_bits(apply_delta(path, BASE), RESULT)
    else:
        refused(path, BASE, "head_sha256")


@given(st.data())
@QUICK
def test_a_flipped_byte_never_gives_another_result(delta, data):
    path, *_, changed = delta
    content = bytearray(changed().read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        result = apply_delta(path, BASE)
    except PeckerError:
        return
    assert same_bits(result, RESULT)


def model_folder(folder: Path, seed: int = 0) -> Path:
    """A folder as a hub gives it: a UNet beside variants and pickles of the same weights, and other parts."""
    import diffusers

    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=[8, 8],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    unet.save_pretrained(folder / "unet")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None]}
    files.write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **parts})
    weights = files.read_weights(folder / "unet")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "model.safetensors", "generator/x.safetensors"):
        files.write_tensors(folder / name, weights)
    for name in ("vae/config.json", "tokenizer/merges.txt", "README.md"):
        files.write_text(folder / name, "{}")
    files.write_tensors(folder / "vae" / "diffusion_pytorch_model-1.safetensors", {"conv_in.bias": torch.ones(2)})
    shards = {"weight_map": {"conv_in.bias": "diffusion_pytorch_model-1.safetensors"}}
    files.write_json(folder / "vae" / "diffusion_pytorch_model.safetensors.index.json", shards)
    files.write_text(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", '{"a": 1}')
    files.write_bytes(folder / "vae" / "weights.bin", b"x")
    return folder


@pytest.fixture
def two(tmp_path):
    """A base folder, and one whose UNet differs in a tenth of the weights."""
    base, result = model_folder(tmp_path / "base"), model_folder(tmp_path / "result")
    weights = files.read_weights(result / "unet")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        weights[name] = torch.where(torch.rand(tensor.shape, generator=generator) < 0.1, tensor + 1, tensor)
    files.write_tensors(result / "unet" / files.WEIGHTS_NAME, weights)
    return base, result


def test_folder_to_folder(two, tmp_path):
    base, result = two
    stats = delta_of_folders(base, result, tmp_path / "delta.safetensors")
    assert 0.05 < stats.changed_weights / stats.weights < 0.2
    parts, _ = files.read_tensors(tmp_path / "delta.safetensors")
    assert sum(part.numel() * part.element_size() for part in parts.values()) < 0.15 * stats.result_bytes
    output = apply_to_folder(tmp_path / "delta.safetensors", base, tmp_path / "output")
    assert same_bits(files.read_weights(output / "unet"), files.read_weights(result / "unet"))
    assert sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()) == [
        "README.md",
        "model_index.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model-1.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert (output / "unet" / "config.json").read_bytes() == (base / "unet" / "config.json").read_bytes()
    for again in (base, result):
        with pytest.raises(OutputError, match="exists already"):
            apply_to_folder(tmp_path / "delta.safetensors", again, output)


def test_nothing_is_left_behind_when_applying_fails(two, tmp_path, monkeypatch):
    base, result = two
    delta_of_folders(base, result, tmp_path / "delta.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="another base"):
        apply_to_folder(tmp_path / "delta.safetensors", result, tmp_path / "output")
    assert sorted(tmp_path.iterdir()) == before

    def fault(name: str) -> None:
        if name == "replace:output":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pecker_fast.files.writing.fault_point", fault)
    with pytest.raises(OutputError, match="free some space"):
        apply_to_folder(tmp_path / "delta.safetensors", base, tmp_path / "output")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("where", ["vae/secret.json", "unet/secret.txt", "secret.txt"])
def test_links_out_of_the_base_are_not_copied(two, tmp_path, where):
    base, result = two
    delta_of_folders(base, result, tmp_path / "delta.safetensors")
    (tmp_path / "secret").write_text("{}")
    (base / where).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="leaves the model folder"):
        apply_to_folder(tmp_path / "delta.safetensors", base, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_folders_that_cannot_be_compared(two, tmp_path):
    base, result = two
    with pytest.raises(ModelError, match="no unet/"):
        delta_of_folders(base, tmp_path / "absent", tmp_path / "delta.safetensors")
    weights = files.read_weights(result / "unet")
    files.write_tensors(result / "unet" / files.WEIGHTS_NAME, weights | {"conv_in.bias": torch.ones(9)})
    with pytest.raises(ModelError, match="same architecture"):
        delta_of_folders(base, result, tmp_path / "delta.safetensors")


def test_single_file_takes_the_delta_of_folders_and_gives_one(two, tmp_path):
    from pecker_fast.networks.single_file import unet_map

    base, result = two
    names = unet_map(files.read_json(base / "unet" / "config.json"))
    others = {"first_stage_model.x": torch.ones(2), "cond_stage_model.transformer.y": torch.arange(3)}

    def single(folder: Path) -> dict[str, torch.Tensor]:
        return {names[name]: tensor for name, tensor in files.read_weights(folder / "unet").items()} | others

    file = tmp_path / "base.safetensors"
    files.write_tensors(file, single(base), {"title": "x"})
    delta_of_folders(base, result, tmp_path / "delta.safetensors")
    output = apply_to_folder(tmp_path / "delta.safetensors", file, tmp_path / "output.safetensors")
    tensors, metadata = files.read_tensors(output)
    assert same_bits(tensors, single(result))
    assert metadata == {"title": "x"}
    delta_of_folders(file, result, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "delta.safetensors").read_bytes()
    delta_of_folders(base, output, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "delta.safetensors").read_bytes()
    with pytest.raises(DataError, match="another base"):
        apply_to_folder(tmp_path / "delta.safetensors", output, tmp_path / "twice.safetensors")
    with pytest.raises(ModelError, match="two single files"):
        delta_of_folders(file, output, tmp_path / "again.safetensors")
