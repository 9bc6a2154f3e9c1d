"""A class-conditional model folder small enough to train in milliseconds."""

import json
from pathlib import Path

import torch

TINY_KEYS = {
    "forget": 0,
    "cover": 1,
    "steps": 4,
    "batch_size": 4,
    "mask": {"samples": 8, "density": 0.3},
    "evaluate": {"every": 2, "samples": 8, "final": 12, "teacher_steps": 2},
    "checkpoint": {"every": 2, "keep": 2},
}


def write_tiny_model(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0, judge: bool = True, least: bool = False
) -> Path:
    """Three classes and a null class, 1×8×8 images; a few thousand random weights. least: a third of the layers."""
    from diffusers import DDPMScheduler, UNet2DModel

    from pecker_fast.evaluate.classifiers import SmallClassifier
    from pecker_fast.evaluate.judge import Reference, save_judge

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,) if least else (8, 8),
        down_block_types=("DownBlock2D",) if least else ("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D",) if least else ("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        add_attention=not least,
        num_class_embeds=4,
    )
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    (folder / "model.json").write_text(json.dumps({"null_class": 3}))
    if judge:
        network = SmallClassifier(1, 8, 3, width=4, features=6)
        labels = torch.arange(60) % 3
        save_judge(folder / "judge", network, Reference(torch.rand(60, 6), labels), {"held_out_accuracy": 0.5})
    return folder
