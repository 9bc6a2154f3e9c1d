"""The configs of a model folder: what each of their values may be, whatever reads them afterwards.

Ranges are wide: they keep out what no network of this kind can have, and what would take minutes or all memory to build.
That a config belongs to its weights is found later, from the names and shapes in their headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast.errors import ModelError
from pecker_fast.files.reading import read_json
from pecker_fast.files.values import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Spec,
    check_values,
    either,
    list_of,
    number,
    one_of,
    optional,
    whole,
)

MOST_POSITIONS = 1024  # of a text; each attends to each
MOST_TIMESTEPS = 10_000  # some schedules compare each with each
MOST_ADDED = 1000  # tokens beside the vocabulary
_BLOCKS = 32
_LAYERS = 256
_WIDTH = whole(1, 1 << 16)
_ROWS = whole(1, 1 << 20)
_PIXELS = either(whole(1, 4096), list_of(whole(1, 4096), 2, 2))
_ACTIVATIONS = ("swish", "silu", "mish", "gelu", "relu")
_ACTIVATION = Spec(f"one of {', '.join(_ACTIVATIONS)}", lambda v: isinstance(v, str) and v.lower() in _ACTIVATIONS)
_DOWN = (
    *("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "SkipDownBlock2D"),
    *("AttnSkipDownBlock2D", "ResnetDownsampleBlock2D", "KDownBlock2D", "KCrossAttnDownBlock2D"),
)
_MIDDLE = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn")


def _up(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.replace("Downsample", "Upsample").replace("Down", "Up") for name in names)


def _old_and_new(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names, *(f"UNetRes{name}" for name in names))  # as before diffusers 0.3


def _each_block(spec: Spec) -> Spec:
    """One for all blocks, or one for each."""
    return either(spec, list_of(spec, 1, _BLOCKS))


_LAYER = whole(1, _LAYERS)
_LAYER_LISTS = list_of(_each_block(_LAYER), 1, _BLOCKS)

_UNET: dict[str, Spec] = {
    "act_fn": _ACTIVATION,
    "attention_head_dim": optional(_each_block(_WIDTH)),
    "block_out_channels": list_of(_WIDTH, 1, _BLOCKS),
    "center_input_sample": FLAG,
    "down_block_types": list_of(one_of(*_old_and_new(_DOWN)), 1, _BLOCKS),
    "downsample_padding": whole(0, 1),
    "dropout": number(0, 1),
    "flip_sin_to_cos": FLAG,
    "freq_shift": number(0, 16),
    "in_channels": _WIDTH,
    "mid_block_scale_factor": number(1e-6, 1e6),
    "mid_block_type": optional(one_of(*_MIDDLE)),
    "norm_eps": number(1e-20, 1),
    "norm_num_groups": optional(_WIDTH),
    "num_class_embeds": optional(_ROWS),
    "out_channels": _WIDTH,
    "resnet_time_scale_shift": one_of("default", "scale_shift", "ada_group", "spatial"),
    "sample_size": optional(_PIXELS),
    "time_embedding_dim": optional(_WIDTH),
    "time_embedding_type": one_of("positional", "fourier", "learned"),
    "up_block_types": list_of(one_of(*_old_and_new(_up(_DOWN))), 1, _BLOCKS),
}
_CLASS_UNET: dict[str, Spec] = {
    "add_attention": FLAG,
    "attn_norm_num_groups": optional(_WIDTH),
    "class_embed_type": optional(one_of("timestep", "identity")),
    "downsample_type": one_of("conv", "resnet"),
    "layers_per_block": _LAYER,
    "num_train_timesteps": optional(whole(1, MOST_TIMESTEPS)),
    "upsample_type": one_of("conv", "resnet"),
}
_TEXT_UNET: dict[str, Spec] = {
    "addition_embed_type": optional(one_of("text", "text_image", "text_time", "image", "image_hint")),
    "addition_embed_type_num_heads": _WIDTH,
    "addition_time_embed_dim": optional(_WIDTH),
    "attention_type": one_of("default", "gated", "gated-text-image"),
    "class_embed_type": optional(one_of("timestep", "identity", "projection", "simple_projection")),
    "class_embeddings_concat": FLAG,
    "conv_in_kernel": whole(1, 31),
    "conv_out_kernel": whole(1, 31),
    "cross_attention_dim": _each_block(_WIDTH),
    "cross_attention_norm": optional(one_of("layer_norm", "group_norm")),
    "dual_cross_attention": FLAG,
    "encoder_hid_dim": optional(_WIDTH),
    "encoder_hid_dim_type": optional(one_of("text_proj", "text_image_proj", "image_proj", "ip_image_proj")),
    "layers_per_block": _each_block(_LAYER),
    "mid_block_only_cross_attention": FLAG,
    "num_attention_heads": optional(_each_block(_WIDTH)),
    "only_cross_attention": either(FLAG, list_of(FLAG, 1, _BLOCKS)),
    "projection_class_embeddings_input_dim": optional(_WIDTH),
    "resnet_out_scale_factor": number(1e-6, 1e6),
    "resnet_skip_time_act": FLAG,
    "reverse_transformer_layers_per_block": optional(_LAYER_LISTS),
    "time_cond_proj_dim": optional(_WIDTH),
    "time_embedding_act_fn": optional(_ACTIVATION),
    "timestep_post_act": optional(_ACTIVATION),
    "transformer_layers_per_block": either(_LAYER, _LAYER_LISTS),
    "upcast_attention": FLAG,
    "use_linear_projection": FLAG,
}
_LATENT = list_of(number(-1e4, 1e4), 1, 4096)
_VAE: dict[str, Spec] = {
    "act_fn": _ACTIVATION,
    "block_out_channels": list_of(_WIDTH, 1, _BLOCKS),
    "down_block_types": list_of(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 1, _BLOCKS),
    "force_upcast": FLAG,
    "in_channels": _WIDTH,
    "latent_channels": _WIDTH,
    "latents_mean": optional(_LATENT),
    "latents_std": optional(_LATENT),
    "layers_per_block": _LAYER,
    "mid_block_add_attention": FLAG,
    "norm_num_groups": _WIDTH,
    "out_channels": _WIDTH,
    "sample_size": _PIXELS,
    "scaling_factor": number(1e-4, 1e4),
    "shift_factor": optional(number(-1e4, 1e4)),
    "up_block_types": list_of(one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), 1, _BLOCKS),
    "use_post_quant_conv": FLAG,
    "use_quant_conv": FLAG,
}
_TOKEN = optional(either(whole(0, 1 << 20), list_of(whole(0, 1 << 20))))
_DTYPES = tuple(
    f"{prefix}{name}" for name in ("float32", "float16", "bfloat16", "float64") for prefix in ("", "torch.")
)
_DTYPE = optional(one_of(*_DTYPES, "auto"))
_EMPTY = Spec("null or empty", lambda value: not value)
_KERNEL = optional(one_of("eager", "sdpa"))  # which compute the same; any other name is fetched, perhaps from the hub
# what a text encoder is built of; keys that no network of this kind has are not handed to the library
TEXT_ENCODER: dict[str, Spec] = {
    "attention_dropout": number(0, 1),
    "bos_token_id": _TOKEN,
    "dropout": number(0, 1),
    "eos_token_id": _TOKEN,
    "hidden_act": one_of("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"),
    "hidden_size": _WIDTH,
    "initializer_factor": number(0, 1e4),
    "initializer_range": number(0, 1e4),
    "intermediate_size": whole(1, 1 << 20),
    "layer_norm_eps": number(1e-20, 1),
    "max_position_embeddings": whole(1, MOST_POSITIONS),
    "num_attention_heads": _WIDTH,
    "num_hidden_layers": whole(1, _LAYERS),
    "pad_token_id": _TOKEN,
    "projection_dim": _WIDTH,
    "vocab_size": whole(1, 1 << 22),
}
# what would make a library load, fetch or change more than the folder's own weights
_LOADING: dict[str, Spec] = {
    "_attn_implementation": _KERNEL,
    "attn_implementation": _KERNEL,
    "dtype": _DTYPE,
    "model_type": optional(one_of("clip_text_model", "clip")),
    "pruned_heads": _EMPTY,
    "quantization_config": NULL,
    "torch_dtype": _DTYPE,
}
_DEFAULTS: dict[str, Spec] = {"_use_default_values": optional(list_of(TEXT, 0, 256)), "quantization_config": NULL}
_BETA = number(0, 1)
_SCHEDULER: dict[str, Spec] = {
    "beta_end": _BETA,
    "beta_schedule": TEXT,
    "beta_start": _BETA,
    "clip_sample": FLAG,
    "clip_sample_range": number(1e-6, 1e6),
    "dynamic_thresholding_ratio": _BETA,
    "num_train_timesteps": whole(1, MOST_TIMESTEPS),
    "prediction_type": optional(TEXT),
    "rescale_betas_zero_snr": FLAG,
    "sample_max_value": number(1e-6, 1e6),
    "thresholding": FLAG,
    "timestep_spacing": TEXT,
    "trained_betas": optional(list_of(_BETA, 1, MOST_TIMESTEPS)),
}
_TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def is_token(value: Any) -> bool:
    """Whether a value is an object that stands for a token, such as those that tokenizers save."""
    return (
        isinstance(value, dict)
        and TEXT.fits(value.get("content"))
        and all(type(value.get(flag, False)) is bool for flag in _TOKEN_FLAGS)
        and value.keys() <= {"content", "id", "__type", *_TOKEN_FLAGS}
    )


_WORD = optional(either(TEXT, Spec("a token", is_token)))
_NAMED_WORDS = Spec(
    "tokens by name", lambda v: isinstance(v, dict) and len(v) <= MOST_ADDED and all(map(_WORD.fits, v.values()))
)
_WORDS = optional(either(list_of(_WORD, 0, MOST_ADDED), _NAMED_WORDS))
# what a tokenizer is built of; other keys are not handed to the library, which would open files by some
TOKENIZER: dict[str, Spec] = {
    "add_prefix_space": FLAG,
    "added_tokens_decoder": OBJECT,
    "additional_special_tokens": _WORDS,
    "bos_token": _WORD,
    "cls_token": _WORD,
    "do_lower_case": FLAG,
    "eos_token": _WORD,
    "errors": TEXT,
    "extra_special_tokens": _WORDS,
    "mask_token": _WORD,
    "model_max_length": whole(1, 1 << 16),
    "pad_token": _WORD,
    "padding_side": one_of("right"),
    "sep_token": _WORD,
    "split_special_tokens": FLAG,
    "tokenizer_class": optional(TEXT),
    "truncation_side": one_of("right"),
    "unk_token": _WORD,
}
_FILES: dict[str, Spec] = dict.fromkeys(
    ("fast_tokenizer_files", "gguf_file", "init_inputs", "merges", "tokenizer_object", "vocab"), _EMPTY
)
_INDEX: dict[str, Spec] = {
    "_class_name": TEXT,
    **dict.fromkeys(("add_watermarker", "force_zeros_for_empty_prompt", "requires_safety_checker"), FLAG),
}
_CARD: dict[str, Spec] = {"kind": optional(TEXT), "null_class": optional(whole(0, 1 << 20))}
_SIZE = whole(1, 1 << 16)
_SHARE = optional(number(0, 1))
_JUDGE: dict[str, Spec] = {
    **dict.fromkeys(("in_channels", "sample_size", "num_classes", "width", "features"), _SIZE),
    "info": OBJECT,
    "sample_size": whole(4, 1 << 16),
    "type": one_of("SmallClassifier", "PatchMixer"),
}
_JUDGE_INFO: dict[str, Spec] = {"held_out_accuracy": _SHARE}
CONFIGS: dict[str, Mapping[str, Spec]] = {
    "UNet2DModel": {**_UNET, **_CLASS_UNET, **_DEFAULTS},
    "UNet2DConditionModel": {**_UNET, **_TEXT_UNET, **_DEFAULTS},
    "AutoencoderKL": {**_VAE, **_DEFAULTS},
    "text encoder": {**TEXT_ENCODER, **_LOADING},
    "scheduler": {**_SCHEDULER, **_DEFAULTS},
    "tokenizer": {**TOKENIZER, **_FILES},
    "model_index.json": _INDEX,
    "model.json": _CARD,
    "judge": _JUDGE,
    "judge's info": _JUDGE_INFO,
}
_PER_BLOCK = (
    *("down_block_types", "up_block_types", "block_out_channels", "attention_head_dim", "layers_per_block"),
    *("num_attention_heads", "only_cross_attention", "cross_attention_dim", "transformer_layers_per_block"),
    "reverse_transformer_layers_per_block",
)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, whatever its values are; raises ModelError."""
    config = read_json(path, error=ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: damaged: a JSON object was expected")
    return config


def read_config(path: Path, kind: str) -> dict[str, Any]:
    """The object in a JSON file of a model. kind: of `CONFIGS`; says which values it may have.

    As `from_pretrained` reads it: of a CLIP model with its image side the text side, and without the keys that diffusers
    wrote as defaults. Raises ModelError, one line that names file, key, value and what is expected.
    """
    config = read_object(path)
    if kind == "text encoder" and "text_config" in config:
        check_values(path, config, {"text_config": OBJECT, **_LOADING})
        config = config["text_config"]
    defaults = config.get("_use_default_values") or ()
    check_config(path, config, kind)
    return {key: value for key, value in config.items() if key not in defaults}


def check_config(path: Path, config: Mapping[str, Any], kind: str) -> None:
    """The values of a config that was read already; raises ModelError."""
    check_values(path, config, CONFIGS[kind])
    blocks = config.get("down_block_types")
    for key in _PER_BLOCK if isinstance(blocks, list) else ():
        found = config.get(key)
        if isinstance(found, list) and len(found) != len(blocks or ()):
            raise ModelError(
                f"{path}: {key} lists {len(found)}, down_block_types {len(blocks or ())} blocks; as many expected"
            )
