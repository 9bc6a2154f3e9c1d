"""Weights as models were released: variants, shards, old names, wrappers, float8; each one clear outcome."""

import pytest
import torch

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.files.weights import find_weights

STEM = "diffusion_pytorch_model"
FP16 = {"a": torch.ones(2, dtype=torch.float16)}


def shard(folder, index, *names):
    """Tensors 0, 1, … in a file each, named by `index`."""
    weight_map = {}
    for number, name in enumerate(names):
        files.write_tensors(folder / name, {str(number): torch.full((2,), float(number))})
        weight_map[str(number)] = name
    files.write_json(folder / index, {"weight_map": weight_map})


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ([f"{STEM}.fp16.safetensors"], ("fp16", f"{STEM}.fp16.safetensors")),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], (None, f"{STEM}.safetensors")),
        ([f"{STEM}.bf16.safetensors", f"{STEM}.fp16.safetensors"], ("fp16", f"{STEM}.fp16.safetensors")),
        ([f"{STEM}.bf16.safetensors", f"{STEM}.bin"], ("bf16", f"{STEM}.bf16.safetensors")),
        ([f"{STEM}.non_ema.safetensors", f"{STEM}.fp16.safetensors"], ("fp16", f"{STEM}.fp16.safetensors")),
        ([f"{STEM}.safetensors.index.fp16.json"], ("fp16", f"{STEM}.safetensors.index.fp16.json")),
        ([f"{STEM}.fp16.safetensors.index.json"], ("fp16", f"{STEM}.fp16.safetensors.index.json")),
        ([f"{STEM}.safetensors.fp16.index.json"], ("fp16", f"{STEM}.safetensors.fp16.index.json")),
        ([f"{STEM}.safetensors.index.json", f"{STEM}.fp16.safetensors"], (None, f"{STEM}.safetensors.index.json")),
        ([f"{STEM}.ema.safetensors"], None),
        ([f"{STEM}.non_ema.safetensors"], None),
        ([f"{STEM}.fp16.bin"], None),
    ],
)
def test_the_plain_file_then_a_half_precision_variant_never_an_average(names, taken):
    found = find_weights(names)
    assert (found and (found.variant, found.file)) == taken


@pytest.mark.parametrize(
    ("index", "names"),
    [
        (f"{STEM}.safetensors.index.fp16.json", [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]),
        (f"{STEM}.fp16.safetensors.index.json", [f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]),
    ],
)
def test_shards_of_a_variant_in_either_naming(tmp_path, index, names):
    shard(tmp_path, index, *names)
    assert {name: t.tolist() for name, t in files.read_weights(tmp_path).items()} == {"0": [0, 0], "1": [1, 1]}
    assert files.variant_of(tmp_path) == "fp16"


def test_a_text_encoder_in_shards(tmp_path):
    shard(
        tmp_path, "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    )
    assert sorted(files.read_weights(tmp_path, "model.safetensors")) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (f"{STEM}.ema.safetensors", rf"of the copies there \({STEM}.ema.safetensors\) rename the one you mean"),
        (f"{STEM}.non_ema.safetensors", "rename the one you mean"),
        (f"{STEM}.int8.safetensors", "rename the one you mean"),
        (f"{STEM}-00001-of-00002.safetensors", r"and of its shards \(.*\) the index"),
        (f"{STEM}.bin", "holds only pickle weights"),
        ("other.safetensors", "the folder holds no safetensors weights"),
    ],
)
def test_what_is_not_taken_is_named(tmp_path, name, match):
    files.write_tensors(tmp_path / name, FP16)
    with pytest.raises(ModelError, match=match):
        files.read_weights(tmp_path)


def test_a_variant_in_place_of_the_plain_file_is_told(tmp_path):
    for part, name in (("unet", STEM), ("vae", STEM), ("text_encoder", "model")):
        files.write_tensors(tmp_path / part / f"{name}.fp16.safetensors", FP16)
    assert files.model_notes(tmp_path) == [
        f"{tmp_path}: the fp16 variant is taken for unet, vae, text_encoder; there is no plain file"
    ]
    files.write_tensors(tmp_path / "unet" / f"{STEM}.safetensors", FP16)
    assert "for vae, text_encoder;" in files.model_notes(tmp_path)[0]
    (tmp_path / "unet_ema").mkdir()
    assert "left out, never loaded: unet_ema" in files.model_notes(tmp_path)[0]


def test_old_names_of_attention_are_todays(tmp_path):
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    weights, wanted = {}, {}
    for number, (name, today) in enumerate(old.items()):
        for block in ("mid_block.attentions.0", "encoder.mid_block.attentions.0", "down_blocks.1.attentions.0"):
            square = torch.full((4, 4), float(number))
            held = square if block.startswith("down") else square.reshape(4, 4, *((1,) * (1 + number % 2)))
            weights |= {f"{block}.{name}.weight": held, f"{block}.{name}.bias": torch.full((4,), float(number))}
            wanted |= {f"{block}.{today}.weight": square, f"{block}.{today}.bias": torch.full((4,), float(number))}
    same = {
        "down_blocks.0.attentions.0.proj_in.weight": torch.ones(4, 4, 1, 1),
        "conv_in.weight": torch.ones(2, 2, 1, 1),
    }
    same |= {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.ones(4, 4)}
    files.write_tensors(tmp_path / files.WEIGHTS_NAME, weights | same)
    read = files.read_weights(tmp_path)
    assert read.keys() == (wanted | same).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in (wanted | same).items())
    twice = {"mid_block.attentions.0.to_q.weight": torch.ones(4, 4)}
    files.write_tensors(tmp_path / files.WEIGHTS_NAME, weights | twice)
    with pytest.raises(ModelError, match="is there twice, under its old name and today's"):
        files.read_weights(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "unet."])
def test_a_wrapper_is_named_with_the_remedy(tmp_path, prefix):
    tensors = {f"{prefix}{name}": torch.ones(1) for name in ("conv_in.bias", "conv_out.bias")}
    files.write_tensors(tmp_path / files.WEIGHTS_NAME, tensors)
    with pytest.raises(ModelError) as caught:
        files.read_weights(tmp_path)
    assert f"named after a wrapper ({prefix}…)" in str(caught.value)
    assert "rename them without it" in str(caught.value)


def test_a_wrapper_inside_is_named_too():
    assert "(down_blocks.0._orig_mod.…)" in files.wrapper_of(["conv_in.bias", "down_blocks.0._orig_mod.conv.bias"])
    assert files.wrapper_of(["conv_in.bias", "down_blocks.0.conv.bias"]) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_widened_exactly(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    wide = files.widened(every)
    assert wide.dtype == torch.float32
    number = ~wide.isnan()
    assert int(number.sum()) > 240
    assert torch.equal(wide.to(dtype).view(torch.uint8)[number], every.view(torch.uint8)[number])
    assert files.widened(torch.ones(1, dtype=torch.float16)).dtype == torch.float16
