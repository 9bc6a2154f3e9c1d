"""Stable Diffusion's networks at their real size: whole iterations with random weights on a GPU; sizes alone without one.

    python bench/full_size.py --arch sd15 --batch 8 --dtype bf16 --iterations 10 [key=value ...]
    python bench/full_size.py --meta       # parameters, FLOPs, predicted memory; writes bench/results/full_size_meta.json

Speed and memory of an iteration do not depend on the values of the weights, so none are needed. MFU is the share of the
device's peak that goes into FLOPs the method asks for: a forward pass that checkpointing repeats is not among them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pecker_kernels import SaliencyMask
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast.account import Clock, add_times, counted, stopwatch
from pecker_fast.account.memory import alive, measured_peak, predict
from pecker_fast.account.memory.networks import TIME_IDS, build
from pecker_fast.conditions.classes import Conditions
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.engine.state import start_ema
from pecker_fast.forgetting.methods import get_method
from pecker_fast.forgetting.updates import adam
from pecker_fast.loading.parts import enable_checkpointing, new_score
from pecker_fast.machine.hardware import environment
from pecker_fast.networks.architectures import PREDICTION_TYPES, TOKENS, architecture
from pecker_fast.networks.denoiser import Denoiser
from pecker_fast.networks.schedule import Schedule
from pecker_fast.networks.text_denoiser import TextDenoiser, TextTable
from pecker_fast.recipe import Recipe, load_recipe
from pecker_fast.runs.loop import iteration

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "full_size_meta.json"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16
GIB = 1 << 30
PROMPTS = 64
KEYS = ["precision=bf16", "ema=0", "optimizer.eps=1e-8", "timesteps.init=625", "timesteps.min=20", "timesteps.max=980"]
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"method": "sfd"},
    "salient_only, density .1": {},
    "score lora": {"method": "sfd", "score": "lora"},
    "salient_only, density .1, score lora": {"score": "lora"},
    "salient_only, density .1, score lora, bf16 weights": {"score": "lora", "weights": "bf16"},
}
SALIENT = ["update_rule=salient_only", "mask.density=0.1"]
Config = Mapping[str, Any]


# -- sizes ---------------------------------------------------------------------------------------------------------------


def inputs_of(config: Config, n: int, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and named arguments of a text-conditional UNet for n samples, on the current device."""
    size, width = config["sample_size"], config["cross_attention_dim"]
    args = (torch.empty(n, config["in_channels"], size, size, dtype=dtype), torch.zeros(n, dtype=torch.long))
    named: dict[str, Any] = {"encoder_hidden_states": torch.empty(n, TOKENS, width, dtype=dtype), "return_dict": False}
    if config.get("addition_embed_type") == "text_time":
        named["added_cond_kwargs"] = {
            "text_embeds": torch.empty(n, pooled_width(config), dtype=dtype), "time_ids": torch.empty(n, TIME_IDS),
        }  # fmt: skip
    return args, named


def pooled_width(config: Config) -> int:
    return config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]


def network_flops(config: Config, backward: bool = True) -> dict[str, int]:
    """Parameters, and FLOPs of one image (2 a multiply-add, attention's products among them): forward, full backward, and
    backward to the input alone."""
    with torch.device("meta"):
        unet = build(config)
        (x, t), named = inputs_of(config, 1)
    found = {"parameters": sum(p.numel() for p in unet.parameters())}

    def run(trainable: bool) -> tuple[int, int]:
        unet.requires_grad_(trainable)
        sample = x.detach().requires_grad_(not trainable)
        with sdpa_kernel(SDPBackend.MATH):  # the products one by one; a fused backward pass repeats one of them
            with FlopCounterMode(display=False) as forward, torch.set_grad_enabled(backward):
                y = unet(sample, t, **named)[0]
            with FlopCounterMode(display=False) as back:
                if backward:
                    y.sum().backward()
        return forward.get_total_flops(), back.get_total_flops()

    found["forward"], full = run(True)
    if backward:
        found |= {"backward": full, "input_backward": run(False)[1]}
    return found


def iteration_flops(flops: Mapping[str, int], batch: int) -> int:
    """Of an SFD iteration without guidance, both branches: ψ learns (θ forward; ψ forward, backward), θ learns (θ, φ, ψ
    forward; φ, ψ back to the input; θ backward)."""
    forward, full, inputs = flops["forward"], flops["backward"], flops["input_backward"]
    return 2 * batch * ((2 * forward + full) + (3 * forward + 2 * inputs + full))


def with_keys(recipe: Recipe, score: str = "full", weights: str = "fp32", checkpointing: bool = False) -> Recipe:
    """The recipe with other keys of memory."""
    engine = recipe.engine.model_copy(update={"weights": weights, "checkpointing": checkpointing})
    return recipe.model_copy(update={"score": score, "engine": engine})


def variant_recipe(name: str, batch: int, checkpointing: bool) -> Recipe:
    options = dict(VARIANTS[name])
    dense = options.pop("method", None) == "sfd"
    recipe = load_recipe(None, [*KEYS, f"batch_size={batch}", *(["method=sfd"] if dense else SALIENT)])
    return with_keys(recipe, checkpointing=checkpointing, **options)


def meta(archs: list[str], output: Path) -> dict[str, Any]:
    """Everything that is known without a device; rows are written as they come."""
    found: dict[str, Any] = {"command": "python bench/full_size.py --meta", "networks": {}, "memory": []}
    for arch in archs:
        unet, vae = architecture(f"{arch}_unet"), architecture(f"{arch}_vae")
        found["networks"][arch] = network_flops(unet)
        for batch in (1, 8) if arch == "sd15" else (1,):
            for name in VARIANTS:
                for checkpointing in (False, True):
                    prediction = predict(
                        variant_recipe(name, batch, checkpointing), unet, vae_config=vae, device="cuda"
                    )
                    row = {
                        "arch": arch, "batch": batch, "variant": name, "checkpointing": checkpointing,
                        "peak_bytes": prediction.peak_bytes, "parts": prediction.parts, "phases": prediction.phases,
                    }  # fmt: skip
                    found["memory"].append(row)
                    most = max(prediction.phases, key=prediction.phases.__getitem__)
                    gib = prediction.peak_bytes / GIB
                    mark = "checkpointing" if checkpointing else ""
                    print(f"{arch:5} batch {batch} {name:52} {mark:13} {gib:7.2f} GiB ({most})", flush=True)
        output.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return found


# -- iterations ----------------------------------------------------------------------------------------------------------


def random_table(config: Config, device: torch.device) -> TextTable:
    """Embeddings of `PROMPTS` prompts that nobody wrote."""
    embeds = torch.randn(PROMPTS, TOKENS, config["cross_attention_dim"], device=device)
    names = tuple(map(str, range(PROMPTS)))
    ids = torch.arange(PROMPTS * TOKENS).view(PROMPTS, TOKENS)
    if config.get("addition_embed_type") != "text_time":
        return TextTable(names, embeds, ids=ids)
    pixels = float(8 * config["sample_size"])
    time_ids = torch.tensor([pixels, pixels, 0.0, 0.0, pixels, pixels], device=device)
    return TextTable(names, embeds, torch.randn(PROMPTS, pooled_width(config), device=device), time_ids, ids)


def released_schedule(prediction_type: str, device: torch.device) -> Schedule:
    """Of all of them: scaled_linear from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    product = (1 - betas).cumprod(0)
    return Schedule(product.sqrt().float().to(device), (1 - product).sqrt().float().to(device), prediction_type, {})


def set_up(
    config: Config, prediction_type: str, recipe: Recipe, device: torch.device
) -> tuple[LocalEngine, TrainState]:
    """φ, ψ, θ of random weights, each its own, and an engine; a random mask where the recipe uses one."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.engine.weights]
    schedule, table = released_schedule(prediction_type, device), random_table(config, device)

    def network() -> Denoiser:
        with device:
            unet = build(config, dtype)
        for p in unet.parameters():
            nn.init.normal_(p, std=0.02)
        return TextDenoiser(unet, schedule, table, null_class=0)

    teacher, generator = network().freeze(), network()
    score = network() if recipe.score == "full" else new_score(recipe, teacher)
    if recipe.engine.checkpointing:
        for one in (teacher, generator, score):
            enable_checkpointing(one.unet)
    named = generator.named_parameters()
    mask = None
    if recipe.uses_mask:
        shape: dict[str, Any] = {"structure": recipe.mask.structure, "tile": tuple(recipe.mask.tile)}
        mask = SaliencyMask.random(named, density=recipe.mask.density, seed=0, **shape)
    conditions = Conditions((0,), (1,), tuple(range(2, PROMPTS)), tuple(range(PROMPTS)))
    state = TrainState(
        teacher, score, generator, adam(recipe, score.named_parameters(), recipe.lr.score),
        get_method(recipe.method).updates(recipe, named, mask), start_ema(generator, recipe.ema),
    )  # fmt: skip
    engine = LocalEngine(recipe, conditions, device)
    engine.attacks.begin(state)
    return engine, state


def measure(
    config: Config, prediction_type: str, recipe: Recipe, iterations: int, device: torch.device
) -> dict[str, Any]:
    """images/s, share of each part, peak memory, MFU of whole iterations."""
    engine, state = set_up(config, prediction_type, recipe, device)
    for _ in range(2):
        iteration(engine, state)
    with measured_peak(device, alive(state)) as peak:
        iteration(engine, state)
    meter, times, before = stopwatch(device), [], state.images
    for _ in range(iterations):
        start = meter()
        iteration(engine, state)
        times.append(meter() - start)
    images, seconds = (state.images - before) / iterations, statistics.median(times)
    account, clock = counted(engine, state), Clock(meter)
    for _ in range(min(iterations, 5)):
        with clock.lap():
            iteration(engine, state)
    add_times(account, clock)
    flops = iteration_flops(network_flops(config), recipe.batch_size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    best = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return {
        "machine": environment(),
        "images_per_s": images / seconds,
        "iteration_ms": 1e3 * seconds,
        "flops": flops,
        "mfu": flops / seconds / best if best and recipe.precision == "bf16" else None,
        "peak_bytes": peak.bytes,
        "predicted_bytes": predicted_steps(config, recipe, device),
        "parts": {
            key: {"share": one["share"], "ms": one["ms"]} for key, one in account["parts"].items() if "ms" in one
        },
    }


def predicted_steps(config: Config, recipe: Recipe, device: torch.device) -> int:
    """Of the iteration alone, which is what is measured."""
    phases = predict(recipe, config, device=device.type).phases
    return max(n for name, n in phases.items() if name in ("score step", "generator step", "average"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(PREDICTION_TYPES))
    parser.add_argument("--batch", type=int, default=1, help="samples of each branch")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the networks' passes")
    parser.add_argument("--weights", choices=("bf16", "fp32"), default="fp32", help="what the weights are kept in")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--meta", action="store_true", help="no iterations: sizes, FLOPs and predicted memory")
    parser.add_argument("--output", type=Path)
    parser.add_argument("keys", nargs="*", metavar="key=value", help="keys of the recipe")
    options = parser.parse_args()
    if options.meta:
        meta([options.arch] if options.arch else ["sd15", "sdxl"], options.output or RESULTS)
        return
    if options.arch is None or not torch.cuda.is_available():
        parser.error("give --arch, on a machine with a GPU; without one there is --meta")
    keys = [*KEYS, f"precision={options.dtype}", f"batch_size={options.batch}", *options.keys]
    recipe = with_keys(load_recipe(None, keys), weights=options.weights, checkpointing=options.checkpointing)
    start = time.perf_counter()
    config = architecture(f"{options.arch}_unet")
    found = measure(config, PREDICTION_TYPES[options.arch], recipe, options.iterations, torch.device("cuda"))
    found |= {"command": f"{options} in {time.perf_counter() - start:.0f} s"}
    text = json.dumps(found, ensure_ascii=False, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
