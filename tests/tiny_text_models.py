"""Text-to-image pipelines of every supported kind, small enough to build in a second: random weights, real classes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

KINDS = ("sd1", "sd2", "sdxl")
LENGTH = 16  # tokens of a prompt
WORDS = [
    *("a", "photo", "of", "the", "on", "in", "small", "large", "red", "green", "blue", "black", "white"),
    *("circle", "square", "triangle", "star", "cat", "dog", "left", "right"),
]


def tiny_tokenizer(words: list[str] = WORDS, length: int = LENGTH) -> Any:
    """A CLIPTokenizer in which each of `words` is one token, and every other text falls into bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    ranks: dict[tuple[str, str], int] = {}  # the trainer of `tokenizers` would break ties by chance
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min((pair for pair in pairs if pair in ranks), key=ranks.__getitem__, default=pairs[0])
            ranks.setdefault(best, len(ranks))
            pieces[pairs.index(best) : pairs.index(best) + 2] = ["".join(best)]
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*bytes_, *(f"{byte}</w>" for byte in bytes_), *("".join(pair) for pair in ranks)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(ranks), model_max_length=length)


def _text_encoder(cls: str, tokenizer: Any, width: int, act: str) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = getattr(transformers, cls)(config)
    with torch.no_grad():  # CLIP starts its embeddings near zero: prompts would hardly differ
        encoder.get_input_embeddings().weight.normal_(std=0.5)
    return encoder.eval()


def tiny_pipeline(folder: Path, kind: str, seed: int = 0, prediction_type: str | None = None) -> Path:
    """Write the pipeline of a kind ("sd1", "sd2", "sdxl") with random weights as a diffusers folder of safetensors.

    Latents 4×8×8, images 3×32×32, prompts of `LENGTH` tokens, embeddings of 16 (sdxl: 16 + 16, pooled 16).
    prediction_type: replaces the kind's own ("v_prediction" for sd2, else "epsilon"). Returns `folder`.
    """
    import diffusers

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        vae = diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
        )
        shared: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1}
        shared |= {"block_out_channels": (16, 32), "norm_num_groups": 4}
        if kind == "sdxl":
            unet = diffusers.UNet2DConditionModel(
                **shared,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2],
                attention_head_dim=[2, 4],
                cross_attention_dim=32,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16 + 6 * 8,
            )
        else:
            unet = diffusers.UNet2DConditionModel(
                **shared,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=[2, 4] if kind == "sd2" else 4,
                cross_attention_dim=16,
                use_linear_projection=kind == "sd2",
            )
        betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = diffusers.DDIMScheduler(
            **betas,
            prediction_type=prediction_type or ("v_prediction" if kind == "sd2" else "epsilon"),
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": tokenizer}
        parts["text_encoder"] = _text_encoder("CLIPTextModel", tokenizer, 16, "gelu" if kind == "sd2" else "quick_gelu")
        if kind == "sdxl":
            parts["tokenizer_2"] = tiny_tokenizer()
            parts["text_encoder_2"] = _text_encoder("CLIPTextModelWithProjection", tokenizer, 16, "gelu")
            pipeline: Any = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        elif kind in KINDS:
            nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **nothing, requires_safety_checker=False)
        else:
            raise ValueError(f"unknown kind {kind!r}")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def tiny_clip(folder: Path) -> Path:
    """A CLIPModel folder as transformers saves it, for pictures of 24×24."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = tiny_tokenizer()
    words = len(tokenizer)
    both = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": words,
        "max_position_embeddings": LENGTH,
        "eos_token_id": words - 1,
        "bos_token_id": words - 2,
        **both,
    }
    vision = {"image_size": 24, "patch_size": 8, **both}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
