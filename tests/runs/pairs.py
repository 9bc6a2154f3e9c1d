"""Every key of the recipe with the values that are tried together, for a tiny model of each kind; what is refused; what is idle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from covering import Choice, Refused, Space
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model
from tiny_text_models import tiny_pipeline

# Other machinery: many processes, a GPU, a compiler, the hub, an audit once a run is done. These keys have suites of their own,
# the slow test takes some in.
ELSEWHERE = ("revision", "engine.zero", "engine.offload", "engine.shard_teacher", "engine.deepspeed", "engine.stall_s",
             "engine.compile", "engine.cuda_graph", "audit.budget", "audit.probes", "audit.against",
             "audit.samples")  # fmt: skip
SALIENCY = {"method": ["pecker"], "mask.source": ["saliency"]}
CUT = {"method": ["pecker"], "mask.source": ["saliency", "random"]}
NEEDS: dict[str, Choice] = {
    "mask.source": {"method": ["pecker"]},
    "update_rule": CUT,
    **{f"mask.{key}": CUT for key in ("structure", "scope", "skip", "refresh")},
    "mask.density": {**CUT, "mask.threshold": [None]},
    "mask.tile": {**CUT, "mask.structure": ["tile"]},
    **{f"mask.{key}": SALIENCY for key in ("score", "contrast", "threshold", "reduction", "samples", "timesteps")},
    "mask.exclude": CUT,
    "mask.only": CUT,
    **{
        f"adversary.{key}": {"adversary.conditions": [4]}
        for key in ("tokens", "steps", "rate", "restart", "share", "half_way", "starts", "batch", "samples")
    },
    "mask.data": {**SALIENCY, "mask.score": ["mse"]},
    "lora.rank": {"score": ["lora"]},
    "lora.targets": {"score": ["lora"]},
}


def common(folder: Path) -> dict[str, list[Any]]:
    """Of both kinds; the first value of each is the plain one, and these together are a recipe that runs."""
    return {
        "method": ["pecker", "sfd"],
        "steps": [2], "distill_steps": [0, 2], "generator": [None, str(folder / "start")], "batch_size": [4, 3],
        "lr.generator": [1e-2, 1e-4], "lr.score": [1e-2, 1e-4], "lr.warmup": [0, 2], "alpha": [1.2, 0.0],
        "timesteps.init": [440, 999], "timesteps.min": [38, 0], "timesteps.max": [712, 1000],
        "guidance.score_train": [1.0, 2.0], "guidance.score": [1.0, 2.0], "guidance.teacher": [1.0, 2.0],
        "guidance.text_dropout": [0.0, 0.5], "detach_score": [False, True],
        "weights.score_retain": [1.0, 0.0], "weights.score_forget": [1.0, 0.0], "weights.retain": [1.0, 0.0],
        "weights.forget": [1.0, 0.0],
        "mask.source": ["saliency", "random", "none"], "mask.score": ["mse", "forget_loss"], "mask.contrast": [False, True],
        "mask.density": [0.3, 1.0], "mask.threshold": [None, 1e-12],
        "mask.structure": ["element", "row", "tile", "tensor"], "mask.tile": [[4, 4], [128, 128]],
        "mask.scope": ["global", "tensor"], "mask.reduction": ["sum", "abs", "square"], "mask.samples": [8, 1],
        "mask.data": ["pseudo", "teacher", str(folder / "images")], "mask.timesteps": ["uniform", "train", "init"],
        "mask.skip": [True, False], "mask.refresh": [0, 1],
        "mask.only": [[]],
        "images.source": ["pool"], "images.samples": [256], "images.steps": [20], "images.guidance": [1.0],
        "objective.eta": [1.0], "objective.ewc": [10.0], "objective.ridge": [0.5], "objective.crucial": [False],
        "mask.exclude": [[], ["time_embedding.*", "conv_in.bias"]],
        "adversary.conditions": [0, 4], "adversary.tokens": [1, 3], "adversary.steps": [1, 2], "adversary.rate": [0.1, 0.01],
        "adversary.restart": [15, 1, 0], "adversary.share": [0.5, 1.0], "adversary.starts": [["forget", "kept"], ["random"]],
        "adversary.batch": [0, 5], "adversary.samples": [512, 6], "adversary.half_way": [0.0, 0.3],
        "update_rule": ["differentiated", "salient_only", "alternating"],
        "optimizer.betas": [[0.0, 0.999], [0.9, 0.99]], "optimizer.eps": [1e-8, 1e-3], "optimizer.weight_decay": [0.0, 0.1],
        "optimizer.clip_value": [1.0, None], "ema": [0.98, 0.0], "precision": ["fp32", "bf16"],
        "score": ["full", "lora"], "student": ["full", "lora"], "lora.rank": [2, 4096], "lora.targets": ["all", "attention"],
        "engine.channels_last": [True, False], "engine.norms": ["plain", "fused"], "engine.threads": [0, 1],
        "engine.weights": ["fp32", "bf16"],
        "engine.checkpointing": [False, True], "engine.micro_batch": [0, 3],
        "evaluate.every": [0, 1], "evaluate.samples": [2, 5], "evaluate.final": [0, 6], "evaluate.teacher_steps": [2, 1],
        "checkpoint.every": [0, 1], "checkpoint.keep": [1, 2], "seed": [0, 2**63 - 1], "output": [str(folder / "run")],
        "resume": ["never", "auto"],
    }  # fmt: skip


FUSED = [
    Refused({"engine.norms": ["fused"], "precision": ["bf16"]}, r"engine\.norms: on a CPU fused norms are of float32"),
    Refused({"engine.norms": ["fused"], "engine.weights": ["bf16"]}, r"engine\.(norms|weights): "),
]
STUDENT = [
    Refused({"student": ["lora"], "mask.refresh": [1]}, r"mask\.refresh: adapters"),
    Refused(
        {"student": ["lora"], "update_rule": ["differentiated", "alternating"]},
        r"update_rule: the mask of a LoRA student",
    ),
]
REFUSED = [
    Refused({"student": ["lora"], "distill_steps": [2]}, r"student: adapters stand on"),
    *STUDENT,
    *FUSED,
    Refused({"engine.weights": ["bf16"], "precision": ["fp32"]}, r"engine\.weights: bf16 weights need precision=bf16"),
    Refused({"weights.score_retain": [0.0], "weights.score_forget": [0.0]}, r"weights\.score_retain: both"),
    Refused({"weights.retain": [0.0], "weights.forget": [0.0]}, r"weights\.retain: both"),
    Refused({"weights.retain": [0.0], "distill_steps": [2]}, r"weights\.retain: distillation needs"),
    Refused({"weights.score_retain": [0.0], "distill_steps": [2]}, r"weights\.retain: distillation needs"),
    Refused({"mask.threshold": [1e-12], "mask.scope": ["tensor"]}, r"mask\.scope: "),
    Refused({"adversary.conditions": [4], "adversary.share": [1.0], "adversary.half_way": [0.3]}, r"adversary\.half_way: 0\.3"),
    Refused({"adversary.conditions": [4], "weights.forget": [0.0]}, r"adversary\.conditions: with weights\.forget=0"),
    Refused({"mask.exclude": [["time_embedding.*", "conv_in.bias"]], "mask.density": [1.0], "mask.threshold": [None],
             "mask.scope": ["global"], "method": ["pecker"], "mask.source": ["saliency", "random"]}, r"mask\.density: 1 of all"),
    # ψ is φ, and so is what its gradient is contrasted with
    Refused({"mask.contrast": [True], "mask.score": ["forget_loss"], "generator": [None], "distill_steps": [0]},
            r"mask\.contrast: .*rounding noise"),
    Refused({"mask.contrast": [True], "mask.score": ["forget_loss"], "score": ["lora"], "distill_steps": [0]},
            r"mask\.contrast: .*rounding noise"),
    Refused({"mask.contrast": [True], "mask.score": ["forget_loss"], "score": ["lora"], "precision": ["bf16"]},
            r"mask\.contrast: .*rounding noise"),  # after two steps of distillation ψ is still near φ
]  # fmt: skip


def class_space(folder: Path) -> Space:
    """A class-conditional model with a judge, a distilled start and images of its classes."""
    model, other = write_tiny_model(folder / "model"), write_tiny_model(folder / "other", seed=1)
    _write_start(folder, model / "unet")
    for number in (0, 2):
        _write_images(folder / "images" / str(number), 8)
    own = {
        "model": [str(model)], "model_config": [None], "null_class": [None, 3],
        "forget": [0, [0, 2]], "cover": [1, [1, 1]], "retain": [None, [1]],
        "guidance.unconditional": [None], "resolution": [None], "evaluate.prompts": [None],
        "evaluate.judge": [None, str(other / "judge")],
    }  # fmt: skip
    refused = [Refused({"forget": [0], "cover": [[1, 1]]}, r"cover: 2 classes for 1 forget classes")]
    return Space({**own, **common(folder)}, [*refused, *REFUSED], NEEDS)


def text_space(folder: Path, kind: str) -> Space:
    """A text-to-image model as a folder and as a single file."""
    from pecker_fast.networks.single_file import to_single_file

    model = tiny_pipeline(folder / "model", kind)
    single = to_single_file(model, folder / "single.safetensors")
    _write_start(folder, model / "unet")
    _write_images(folder / "images", 32)
    captions = ["a red circle on the left", "a photo of the blue circle", "a red square", "a white dog"]
    concept = {"concept": "circle", "captions": captions}
    own = {
        "model": [str(model), str(single)], "model_config": [None, str(model)], "null_class": [None],
        "forget": [concept, {"keywords": ["red"], "prompts": ["cat"]}, ["a photo of the cat"]],
        "cover": ["square", None], "retain": [["a blue triangle", "green star"], captions],
        "guidance.unconditional": [None, "blurry", "keywords"], "resolution": [None, 48],
        "evaluate.prompts": [None, captions], "evaluate.judge": [None],
    }  # fmt: skip
    plain = [["a photo of the cat"]]
    refused = [
        Refused({"model": [str(model)], "model_config": [str(model)]}, r"model_config: is for single files"),
        Refused({"model": [str(single)], "model_config": [None]}, r"give model_config=FOLDER"),
        Refused({"forget": [concept, *plain], "cover": [None]}, r"cover: "),
        Refused({"forget": [concept, *plain], "guidance.unconditional": ["keywords"]}, r"guidance\.unconditional: "),
        # sorted by the concept: keywords and prompts have none, and with them what only they go with
        Refused(
            {"forget": own["forget"][1:], "evaluate.prompts": [captions]}, r"evaluate\.prompts: captions are sorted"
        ),
        Refused({"cover": [None], "evaluate.prompts": [captions]}, r"cover: |evaluate\.prompts: "),
        Refused({"guidance.unconditional": ["keywords"], "evaluate.prompts": [captions]}, r"guidance\.unconditional: "),
    ]
    return Space({**own, **common(folder)}, [*refused, *REFUSED], NEEDS)


KEPT_TEXT = """
steps batch_size lr.generator lr.warmup weights.retain weights.forget mask.density mask.threshold
mask.structure mask.tile mask.scope mask.reduction mask.samples mask.skip mask.refresh mask.exclude
update_rule optimizer.betas optimizer.weight_decay optimizer.clip_value ema precision engine.channels_last engine.norms
engine.weights engine.checkpointing engine.micro_batch evaluate.every evaluate.samples evaluate.final
checkpoint.every resume output student lora.rank lora.targets
"""  # keys of `common` that methods of many steps have use for


def denoiser_space(folder: Path) -> Space:
    """Methods that leave a model of many steps, on the class-conditional one: every key that does something for them."""
    model = write_tiny_model(folder / "model")
    for number in (0, 2):
        _write_images(folder / "images" / str(number), 8)
    every = common(folder)
    own: dict[str, list[Any]] = {
        "method": ["spare", "salun", "esd", "sa"], "model": [str(model)], "forget": [0, [0, 2]], "cover": [1], "retain": [[1]],
        "images.source": ["pool", "trajectory"], "images.samples": [6, 1], "images.steps": [2, 3], "images.guidance": [1.0, 2.0],
        "objective.eta": [1.0, 3.0], "objective.ewc": [10.0, 0.0], "objective.crucial": [False, True],
        "timesteps.min": [0, 30], "timesteps.max": [1000, 500], "evaluate.teacher_steps": [2],
        "mask.source": ["saliency", "names", "random", "none"], "mask.score": ["mse", "forget_loss"],
        "mask.contrast": [False, True], "mask.data": ["pseudo", str(folder / "images")],
        "mask.timesteps": ["uniform", "train"], "mask.only": [["conv_in.*", "mid_block.*", "*.weight"], ["*"]],
    }  # fmt: skip
    masked = ["spare", "salun", "esd"]
    needs: dict[str, Choice] = {
        "mask.source": {"method": masked}, "update_rule": {"method": masked, "mask.source": ["saliency", "names", "random"]},
        **{f"mask.{key}": {"method": masked, "mask.source": ["saliency", "random"]}
           for key in ("density", "structure", "scope", "tile", "refresh")},
        **{f"mask.{key}": {"method": masked, "mask.source": ["saliency"]}
           for key in ("score", "contrast", "threshold", "reduction", "samples", "timesteps", "data")},
        **{f"mask.{key}": {"method": masked, "mask.source": ["saliency", "names", "random"]}
           for key in ("only", "exclude", "skip")},
        "images.samples": {"images.source": ["pool"]},
        "lora.rank": {"student": ["lora"]}, "lora.targets": {"student": ["lora"]},
    }  # fmt: skip
    refused = [
        Refused({"method": ["sa"], "student": ["lora"]}, r"student: the springs"),
        *STUDENT,
        *FUSED,
        Refused({"method": ["salun", "sa"], "images.source": ["trajectory"]}, r"images\.source: method"),
        Refused({"images.source": ["trajectory"], "mask.score": ["mse"]}, r"mask\.score: mse"),
        Refused({"images.source": ["trajectory"], "mask.contrast": [True]}, r"mask\.score: mse"),
        Refused({"mask.contrast": [True], "mask.score": ["forget_loss"]}, r"mask\.contrast: with"),
        Refused({"engine.weights": ["bf16"], "precision": ["fp32"]}, r"engine\.weights: bf16 weights need precision=bf16"),
        Refused({"mask.threshold": [1e-12], "mask.scope": ["tensor"]}, r"mask\.scope: "),
        Refused({"weights.retain": [0.0], "weights.forget": [0.0]}, r"weights\.retain: both"),
        Refused({"method": masked, "mask.source": ["saliency", "random"], "mask.density": [1.0], "mask.threshold": [None],
                 "mask.scope": ["global"]}, r"mask\.density: 1 of all"),
    ]  # fmt: skip
    return Space({**own, **{key: every[key] for key in KEPT_TEXT.split()}}, refused, needs)


def _write_start(folder: Path, unet: Path) -> None:
    """`start/`: a distilled generator and its score network, moved off the teacher."""
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    for seed, name in ((1, "generator"), (2, "score")):
        draw = torch.Generator().manual_seed(seed)
        moved = {key: value + 0.05 * torch.randn(value.shape, generator=draw) for key, value in tensors.items()}
        (folder / "start" / name).mkdir(parents=True)
        save_file(moved, folder / "start" / name / "diffusion_pytorch_model.safetensors")
        (folder / "start" / name / "config.json").write_text((unet / "config.json").read_text())


def _write_images(folder: Path, size: int) -> None:
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (size, size), (40 * i, 80, 160)).save(folder / f"{i}.png")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as the mapping a recipe is read from; keys that are left to their defaults are not in it."""
    data: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        inside = data
        for name in parents:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return data


def one_line(message: str, why: str) -> bool:
    return "\n" not in message and re.search(why, message) is not None


def short(row: dict[str, Any], plain: dict[str, Any]) -> str:
    """What of a row is not plain, as overrides of a command line."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in row.items() if value != plain[key])
