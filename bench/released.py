"""Folders that stock diffusers writes from the configs of released models, at full width with random weights: does the whole
line take them, how long, with how much memory?

    python bench/released.py [sd15 sd15_fp16 sd21 sdxl class256] [--work FOLDER] [--output bench/results/released.json]

For each: `train --dry-run`; loading all that a run starts from; the same and an export in two formats, without training and
without the images that a run draws. The exported UNet must have the base's very bits. Values of weights change neither time nor
memory, so none are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pecker_fast.machine.hardware import environment
from pecker_fast.networks.architectures import architecture

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_text_models import tiny_tokenizer  # noqa: E402  the vocabulary of a released model is not at hand

RESULTS = ROOT / "bench" / "results" / "released.json"
VOCABULARY, TOKENS = 49408, 77
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VISION_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
CLASS_256 = {  # the UNet of the 256-pixel DDPMs, with the 1,000 classes of ImageNet and a null class
    "sample_size": 256, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512), "num_class_embeds": 1001, "norm_eps": 1e-6,
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}  # fmt: skip


def filled(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """A network with quickly made random weights: drawing billions of them one by one would take minutes."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device="cpu")
    drawn = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for _, p in [*module.named_parameters(), *module.named_buffers()]:
        flat = p.data.view(-1)
        if not p.is_floating_point():  # position ids
            flat.copy_(torch.arange(flat.numel()))
            continue
        for start in range(0, flat.numel(), len(drawn)):
            piece = flat[start : start + len(drawn)]
            piece.copy_(drawn[: len(piece)])
    return module.eval()


def text_encoder(sizes: dict[str, int], act: str, projection: int | None, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **sizes, vocab_size=VOCABULARY, max_position_embeddings=TOKENS, hidden_act=act, projection_dim=projection or 512
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return filled(lambda: kind(config), dtype)


def networks(unet: str, vae: str, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return {
        "unet": filled(lambda: UNet2DConditionModel.from_config(architecture(unet)), dtype),
        "vae": filled(lambda: AutoencoderKL.from_config(architecture(vae)), dtype),
        "tokenizer": tiny_tokenizer(length=TOKENS),
    }


def write_sd15(folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None) -> None:
    """With a safety checker beside it and the autoencoder's old names, as it was released."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    config = CLIPConfig(text_config=CLIP_L, vision_config={**VISION_L, "image_size": 224}, projection_dim=768)
    StableDiffusionPipeline(
        **networks("sd15_unet", "sd15_vae", dtype),
        text_encoder=text_encoder(CLIP_L, "quick_gelu", None, dtype),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=filled(lambda: StableDiffusionSafetyChecker(config), dtype),
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder, variant=variant)
    old_names(next((folder / "vae").glob("*.safetensors")))


def old_names(file: Path) -> None:
    """The autoencoder's attention as diffusers called it before 0.17."""
    from safetensors.torch import load_file, save_file

    def old(name: str) -> str:
        for new, was in OLD_VAE.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{was}.")
        return name

    save_file({old(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def write_sd21(folder: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    dtype = torch.float32
    StableDiffusionPipeline(
        **networks("sd21_unet", "sd15_vae", dtype),
        text_encoder=text_encoder(CLIP_H, "gelu", None, dtype),
        scheduler=DDIMScheduler(
            **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_sdxl(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    dtype = torch.float16
    StableDiffusionXLPipeline(
        **networks("sdxl_unet", "sdxl_vae", dtype),
        text_encoder=text_encoder(CLIP_L, "quick_gelu", None, dtype),
        text_encoder_2=text_encoder(CLIP_G, "gelu", 1280, dtype),
        tokenizer_2=tiny_tokenizer(length=TOKENS),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)


def write_class256(folder: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    filled(lambda: UNet2DModel(**CLASS_256), torch.float32).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")


MODELS: dict[str, Callable[[Path], None]] = {
    "sd15": write_sd15,
    "sd15_fp16": lambda folder: write_sd15(folder, torch.float16, "fp16"),
    "sd21": write_sd21,
    "sdxl": write_sdxl,
    "class256": write_class256,
}


def recipe_of(name: str, model: Path, run: Path) -> dict[str, Any]:
    """No iteration; weights in bfloat16 and an adapter for ψ, so that SDXL fits a small machine."""
    shared = {
        "model": str(model), "steps": 0, "batch_size": 1, "ema": 0, "precision": "bf16", "score": "lora",
        "update_rule": "salient_only", "mask": {"samples": 1, "density": 0.1},
        "engine": {"weights": "bf16", "checkpointing": True}, "evaluate": {"every": 0, "final": 0}, "output": str(run),
    }  # fmt: skip
    if name == "class256":
        return {**shared, "forget": 207, "cover": 208, "null_class": 1000}
    text = {"forget": {"concept": "circle", "prompts": ["a red {}"]}, "cover": "square", "retain": ["a white dog"]}
    return {**shared, **text, "timesteps": {"init": 625, "min": 20, "max": 980}}


def load(recipe: str) -> Any:
    """What a run starts from."""
    from pecker_fast.loading import load_parts
    from pecker_fast.recipe import load_recipe

    resolved = load_recipe(recipe)
    return resolved, load_parts(resolved)


def export(recipe: str, folder: str, form: str) -> None:
    """θ as it starts, as a diffusers folder and as one file."""
    from pecker_fast.export import Result, export_file, export_folder

    resolved, parts = load(recipe)
    result = Result(parts.generator, resolved, parts, parts.base_sha256)
    export_folder(result, Path(folder), Path(folder) / "pipeline")
    export_file(result, Path(folder) / f"{form}.safetensors", form)


def measured(*arguments: str, cwd: Path) -> dict[str, Any]:
    """Wall time and peak resident memory of one command of python; raises SystemExit where it fails."""
    started = time.perf_counter()
    log = cwd / "log.txt"
    pid = os.posix_spawn(
        sys.executable, [sys.executable, *arguments], {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )  # fmt: skip
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"{' '.join(arguments)}: exit code {code}\n{log.read_text()[-2000:]}")
    return {"wall_s": round(time.perf_counter() - started, 1), "peak_rss_gib": round(usage.ru_maxrss / (1 << 20), 2)}


def same_bits(base: Path, result: Path) -> int:
    """Number of UNet tensors compared; raises SystemExit where one is not the base's, bit for bit."""
    theirs = next(path for path in sorted((base / "unet").glob("*.safetensors")))
    with safe_open(theirs, "pt") as old, safe_open(result / "unet/diffusion_pytorch_model.safetensors", "pt") as new:
        names = set(old.keys())
        if names != set(new.keys()):
            raise SystemExit(f"{result}: other tensors than the base")
        for name in names:
            a, b = old.get_tensor(name), new.get_tensor(name)
            if a.dtype != b.dtype or not torch.equal(a, b):
                raise SystemExit(f"{result}: {name} is not the base's")
    return len(names)


def tried(name: str, work: Path) -> dict[str, Any]:
    """All commands over one model; its files are removed again."""
    folder = work / name
    model, run = folder / "model", folder / "run"
    folder.mkdir(parents=True)
    try:
        MODELS[name](model)
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(recipe_of(name, model, run)))
        form = "unet" if name == "class256" else "single"
        found = {
            "model_gib": round(size / (1 << 30), 2),
            "dry run": measured("-m", "pecker_fast", "train", str(recipe), "--dry-run", cwd=folder),
            "load": measured(__file__, "--inside", "load", str(recipe), cwd=folder),
            f"load, export diffusers and {form}": measured(
                __file__, "--inside", "export", str(recipe), str(run), form, cwd=folder
            ),
            "tensors_equal": same_bits(model, run / "pipeline"),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        {"load": load, "export": export}[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--work", type=Path, help="where the folders are written (about 20 GiB)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    kept = json.loads(given.output.read_text())["models"] if given.output.is_file() else {}
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        for name in given.models or MODELS:
            kept[name] = tried(name, Path(work))
            print(name, json.dumps(kept[name]), flush=True)
            given.output.write_text(json.dumps({"machine": environment(), "models": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
