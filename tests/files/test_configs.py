"""Values of foreign configs: what real models have is taken, what no network can have is refused in one line."""

import json
import math

import pytest

from pecker_fast import files
from pecker_fast.errors import ModelError, OutOfMemory
from pecker_fast.files import CONFIGS, Size, check_config, check_size
from pecker_fast.files.sizes import _LEAST
from pecker_fast.networks import architectures

# tensors and numbers of the released weights
RELEASED = {
    "sd15_unet": ("UNet2DConditionModel", Size(686, 859_520_964)),
    "sd21_unet": ("UNet2DConditionModel", Size(686, 865_910_724)),
    "sdxl_unet": ("UNet2DConditionModel", Size(1680, 2_567_463_684)),
    "sd15_vae": ("AutoencoderKL", Size(248, 83_653_863)),
    "sdxl_vae": ("AutoencoderKL", Size(248, 83_653_863)),
}
CIFAR = {  # the first UNet2DModel on the hub
    "_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
CLIP = {
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
    "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32", "vocab_size": 49408,
}  # fmt: skip
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False, "lambda_min_clipped": -math.inf,
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_fit_and_hold_more_than_the_least(name, tmp_path):
    kind, size = RELEASED[name]
    config = architectures.architecture(name)
    check_config(tmp_path, config, kind)
    check_size(tmp_path, config, kind, size)
    least = _LEAST[kind](config)
    assert least.tensors > size.tensors / 8  # a bound that says something
    assert least.numbers > size.numbers / 32


def test_other_released_configs_fit(tmp_path):
    check_config(tmp_path, CIFAR, "UNet2DModel")
    check_size(tmp_path, CIFAR, "UNet2DModel", Size(278, 35_746_307))
    check_config(tmp_path, CLIP, "text encoder")
    check_size(tmp_path, CLIP, "text encoder", Size(196, 123_060_480))
    check_config(tmp_path, SD15_SCHEDULER, "scheduler")
    words = {"bos_token": {"content": "<|startoftext|>", "lstrip": False}, "pad_token": "!", "model_max_length": 77}
    check_config(tmp_path, {**words, "name_or_path": "openai/clip", "add_prefix_space": False}, "tokenizer")


@pytest.mark.parametrize("model", files.shipped_models())
def test_the_shipped_models_fit(model):
    folder = files.resolve_model(model)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        kind = config.get("_class_name") or ("judge" if path.parent.name in files.JUDGES else "text encoder")
        check_config(path, config, kind)
        if kind != "judge":
            name = "model.safetensors" if kind == "text encoder" else files.WEIGHTS_NAME
            check_size(path, config, kind, files.size_of_weights(path.parent, name))
    for name, kind in (("scheduler/scheduler_config.json", "scheduler"), ("model.json", "model.json")):
        files.read_config(folder / name, kind)


def test_every_number_of_every_config_has_bounds():
    """What is not bounded is built, or counted to."""
    for kind, specs in CONFIGS.items():
        for key, spec in specs.items():
            for value in (10**9, 2**31, -(10**9), 10**30, 1e30, math.nan, math.inf, -math.inf):
                assert not spec.fits(value), (kind, key, value)
                assert not spec.fits([value]), (kind, key, value)
            assert not spec.fits([1] * 100_001), (kind, key)
            assert not spec.fits("x" * 100_000), (kind, key)


def test_a_config_is_what_from_pretrained_makes_of_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"norm_eps": 0.5, "act_fn": "relu", "_use_default_values": ["norm_eps"]}))
    assert files.read_config(path, "UNet2DModel").keys() == {"act_fn", "_use_default_values"}
    path.write_text(json.dumps({"model_type": "clip", "text_config": {"hidden_size": 8}, "vision_config": {}}))
    assert files.read_config(path, "text encoder") == {"hidden_size": 8}
    path.write_text(json.dumps({"text_config": {"num_hidden_layers": 10**6}}))
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000"):
        files.read_config(path, "text encoder")


WRONG = [
    ("UNet2DModel", "norm_eps", math.nan, "norm_eps is nan; expected a number from 1e-20 to 1"),
    ("UNet2DModel", "norm_eps", True, "norm_eps is true; expected a number"),
    ("UNet2DModel", "layers_per_block", 10**9, "layers_per_block is 1000000000; expected a whole number from 1 to 256"),
    ("UNet2DModel", "layers_per_block", 2.0, "layers_per_block is 2.0; expected a whole number"),
    ("UNet2DModel", "layers_per_block", True, "layers_per_block is true; expected a whole number"),
    (
        "UNet2DModel",
        "sample_size",
        [32],
        "sample_size is [32]; expected a whole number from 1 to 4096 or a list (2 long)",
    ),
    ("UNet2DModel", "mid_block_scale_factor", 0, "mid_block_scale_factor is 0; expected a number"),
    ("UNet2DModel", "act_fn", ["silu"], "act_fn is ['silu']; expected one of swish, silu"),
    (
        "UNet2DModel",
        "down_block_types",
        ["Evil"],
        "down_block_types is ['Evil']; expected a list (1 to 32 long), each one",
    ),
    ("UNet2DModel", "down_block_types", "DownBlock2D", "down_block_types is 'DownBlock2D'; expected a list"),
    ("UNet2DConditionModel", "cross_attention_dim", None, "cross_attention_dim is null; expected a whole number"),
    (
        "UNet2DConditionModel",
        "transformer_layers_per_block",
        [[1, 0]],
        "transformer_layers_per_block is [[1, 0]]; expected",
    ),
    ("AutoencoderKL", "scaling_factor", "0.18", "scaling_factor is '0.18'; expected a number"),
    ("AutoencoderKL", "scaling_factor", -math.inf, "scaling_factor is -inf; expected a number"),
    ("AutoencoderKL", "latents_mean", [0, None], "latents_mean is [0, None]; expected a list"),
    ("text encoder", "vocab_size", 10**30, "vocab_size is 1000000000000000000000000000000; expected a whole number"),
    ("text encoder", "hidden_act", "x" * 10**6, "hidden_act is 'xxx"),
    ("scheduler", "num_train_timesteps", -1, "num_train_timesteps is -1; expected a whole number from 1 to 10000"),
    ("scheduler", "trained_betas", 7, "trained_betas is 7; expected a list"),
    ("scheduler", "beta_end", 1e308, "beta_end is 1e+308; expected a number from 0 to 1"),
    ("tokenizer", "model_max_length", 10**30, "model_max_length is 1000000000000000000000000000000; expected"),
    ("tokenizer", "eos_token", 3, "eos_token is 3; expected a text or a token or null"),
    ("model.json", "null_class", "3", "null_class is '3'; expected a whole number"),
    ("model.json", "null_class", False, "null_class is false; expected a whole number"),
    ("judge", "info", [], "info is []; expected an object"),
]


@pytest.mark.parametrize(("kind", "key", "value", "message"), WRONG)
def test_a_value_that_no_model_has_is_refused_in_one_line(kind, key, value, message, tmp_path):
    with pytest.raises(ModelError) as caught:
        check_config(tmp_path / "config.json", {key: value}, kind)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) - len(str(tmp_path)) < 300


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_that_nobody_reads_are_left_alone(kind, tmp_path):
    check_config(tmp_path, {"added_by_somebody": math.nan, "_note": [1]}, kind)


def test_lists_have_an_entry_for_each_block(tmp_path):
    config = {"down_block_types": ["DownBlock2D"] * 2, "block_out_channels": [8, 8, 8]}
    with pytest.raises(ModelError, match="block_out_channels lists 3, down_block_types 2"):
        check_config(tmp_path, config, "UNet2DModel")


def unet(**keys):
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    return {**blocks, "block_out_channels": [8], "layers_per_block": 2, **keys}


@pytest.mark.parametrize(
    ("kind", "config", "least"),
    [
        ("UNet2DConditionModel", unet(), Size(4 * (2 + 3) + 10 * (2 + 3), 9 * 64 * (2 + 3))),
        ("UNet2DConditionModel", unet(transformer_layers_per_block=[4]), Size(4 * 5 + 40 * 5, 9 * 64 * 5)),
        ("UNet2DConditionModel", unet(layers_per_block=[7]), Size(4 * 15 + 10 * 15, 9 * 64 * 15)),
        ("UNet2DModel", {"block_out_channels": [4, 8], "layers_per_block": 1}, Size(4 * 6, 9 * 3 * (16 + 64))),
        ("AutoencoderKL", {"block_out_channels": [4], "layers_per_block": 9}, Size(4 * 19, 9 * 16 * 19)),
        (
            "text encoder",
            {
                "vocab_size": 10,
                "max_position_embeddings": 3,
                "hidden_size": 2,
                "intermediate_size": 5,
                "num_hidden_layers": 7,
            },
            Size(16 * 7 + 4, 26 + 7 * (16 + 20)),
        ),
    ],
)
def test_more_than_the_weights_hold_is_refused_before_building(kind, config, least, tmp_path):
    check_size(tmp_path, config, kind, least)
    for held, what in ((least._replace(tensors=least.tensors - 1), "tensors"), (least._replace(numbers=1), "numbers")):
        with pytest.raises(ModelError, match=f"asks for a network of at least [0-9,]+ {what}; its weights hold"):
            check_size(tmp_path, config, kind, held)


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), OSError(40, "a\nb"), ZeroDivisionError()])
def test_errors_of_libraries_become_one_line(error, tmp_path):
    with pytest.raises(ModelError, match="cannot be built") as caught, files.guarded(tmp_path, "cannot be built"):
        raise error
    assert type(error).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)
    for passes in (KeyboardInterrupt(), SystemExit(3), ModelError("ours")):
        with pytest.raises(type(passes)) as own, files.guarded(tmp_path, "cannot be built"):
            raise passes
        assert own.value is passes
    with pytest.raises(OutOfMemory, match="out of memory while"), files.guarded(tmp_path, "cannot be built"):
        raise MemoryError
