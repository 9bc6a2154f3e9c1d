"""CLIP score: how near images are to the text they were asked for (Hessel et al. 2021), by the user's own CLIP folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast import files
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.evaluate.classes import Sampler
from pecker_fast.evaluate.drawing import Prompt, dealt, drawn

BATCH = 16
Similarity = Callable[
    [Tensor, Sequence[str]], Tensor
]  # (images [N, 3, H, W] in [-1, 1], a text for each) -> cosines [N]


def load_clip(folder: str | Path) -> Similarity:
    """The similarity of a transformers folder of a CLIPModel: config.json, safetensors weights, tokenizer, preprocessor.

    Raises ModelError for a folder that is none; nothing is fetched, pickles are not opened.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"--clip {path}: no such folder; give one with a CLIPModel as transformers saves it")
    kind = files.read_object(path / files.CONFIG_NAME).get("model_type")
    if kind != "clip":
        raise ModelError(f"--clip {path}: its model_type is {files.shown(kind)}, not clip")
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    here: dict[str, Any] = {"local_files_only": True}
    with files.guarded(path, "not a CLIP model with tokenizer and preprocessor"):
        model: Any = CLIPModel.from_pretrained(path, use_safetensors=True, **here).eval()
        tokenizer: Any = CLIPTokenizer.from_pretrained(path, **here)
        pixels: Any = CLIPImageProcessor.from_pretrained(path, **here)
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def similarity(images: Tensor, texts: Sequence[str]) -> Tensor:
        bytes_ = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        given = pixels(list(bytes_), return_tensors="pt", input_data_format="channels_first")
        out = model(
            pixel_values=given["pixel_values"], input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        cosines: Tensor = (out.image_embeds * out.text_embeds).sum(1)
        return cosines.double()

    return similarity


Groups = Mapping[str, tuple[Sequence[Prompt], Sequence[str] | None]]


def clip_score(sampler: Sampler, groups: Groups, similarity: Similarity, samples: int, seed: int = 0) -> dict[str, Any]:
    """100 · max(cos, 0), the mean over `samples` images of each group.

    groups: by name the prompts that are drawn, dealt in turn, and the text each is compared with (None: its own). Groups of one
    name up to ":" are drawn once: "forget" with its own text, "forget:cover" with the cover's. Returns the mean of each group, with
    its 95 % interval, and `samples`. Raises RecipeError for no samples, ModelError where a similarity is no number.
    """
    if samples < 1:
        raise RecipeError(f"clip: needs samples ≥ 1, got {samples}")
    values: dict[str, list[Tensor]] = {name: [] for name in groups}
    for group in dict.fromkeys(name.partition(":")[0] for name in groups):
        prompts = groups[group][0]
        order = dealt(len(prompts), samples, seed, group)
        rows = torch.tensor([prompt.row for prompt in prompts])[order]
        done = 0
        for images in drawn(sampler, rows, seed, group):
            places = order[done : done + len(images)].tolist()
            for name, (asked, texts) in groups.items():
                if name.partition(":")[0] == group:
                    beside = [asked[i].text if texts is None else texts[i] for i in places]
                    values[name].append(_compared(similarity, images, beside))
            done += len(images)
    found = {name: torch.cat(parts) for name, parts in values.items()}
    means = {name: float(value.mean()) for name, value in found.items()}
    intervals = {name: _interval(value) for name, value in found.items()}
    return {"protocol": "clip", "clip_score": means, "intervals": {"clip_score": intervals}, "samples": samples}


def _interval(values: Tensor) -> list[float] | None:
    """95 % of the mean, by the normal; None of a single value."""
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return [mean - half, mean + half]


def _compared(similarity: Similarity, images: Tensor, texts: Sequence[str]) -> Tensor:
    images = images.detach().float().cpu().clamp(-1, 1)
    parts = [similarity(images[i : i + BATCH], texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    cosines = torch.cat(parts)
    if not bool(cosines.isfinite().all()):
        raise ModelError("clip: a similarity is not a finite number; is the CLIP folder damaged?")
    return 100 * cosines.clamp(min=0)
