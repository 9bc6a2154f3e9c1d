"""model_index.json: which parts of a pipeline are used, which are known and left out, which are refused as foreign code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast.errors import ModelError
from pecker_fast.files.reading import read_json
from pecker_fast.files.values import shown

INDEX_NAME = "model_index.json"
UNETS = ("UNet2DModel", "UNet2DConditionModel")  # the denoising networks there is an interface for
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# part → (library, classes; none named: the part's own reader decides)
USED: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", UNETS),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "scheduler": ("diffusers", ()),
    "text_encoder": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer": ("transformers", _TOKENIZERS),
    "tokenizer_2": ("transformers", _TOKENIZERS),
}
_BESIDE = ("safety_checker", "feature_extractor", "image_encoder")  # of the same pipelines, and never loaded
JUDGES = ("judge", "second_judge")
PARTS = ("", *USED, *JUDGES, "generator", "score")  # folders that are ever read; "" = the model folder itself
_TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "added_tokens.json",
)
TEXTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt")
# part → its files beside weights, as diffusers and transformers write and read them; no other is read or copied
SMALL_FILES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PARTS, ("config.json",)),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), _TOKENIZER_FILES),
    "scheduler": ("scheduler_config.json",),
    "": ("model_index.json", "model.json", "config.json", "scheduler_config.json", *TEXTS),
}
_LIBRARIES = frozenset({"diffusers", "transformers"})
# diffusers finds these names among its own pipelines, before it would look at any file of the model
_PIPELINE_MODULES = frozenset(
    {
        *("alt_diffusion", "blip_diffusion", "controlnet", "deepfloyd_if", "flux", "kandinsky", "latent_diffusion"),
        *("paint_by_example", "pipelines", "semantic_stable_diffusion", "stable_diffusion", "stable_diffusion_safe"),
        *("stable_diffusion_xl", "t2i_adapter", "unclip", "versatile_diffusion", "wuerstchen"),
    }
)
_BESIDE_CLASSES = (
    "SafetyChecker",
    "Watermarker",
    "ImageEncoder",
    "ImageNormalizer",
    "ImageProcessor",
    "FeatureExtractor",
)
NO_CODE = "names custom code, which is never run; use a plain diffusers model"


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a folder, {} where there is none. Raises ModelError for one that is damaged."""
    path = folder / INDEX_NAME
    index = read_json(path, error=ModelError) if path.is_file() else {}
    if not isinstance(index, dict):
        raise ModelError(f"{path}: damaged: a JSON object was expected")
    return index


def check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Raises ModelError unless every part is one that is used, of the class there is a reader for, or known and left out."""
    for part in (*USED, *_BESIDE):
        if part in index and not _is_entry(index[part]):
            raise ModelError(f"{path}: {part} is {shown(index[part])}; [library, class] or [null, null] was expected")
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or not any(isinstance(v, str) for v in value):
            continue
        classes = USED[part][1] if part in USED else ()
        if classes and len(value) == 2 and value[0] in tuple(_LIBRARIES) and value[1] not in classes:
            raise ModelError(f"{path}: {part} is a {value[1]}; only {' or '.join(classes)} is supported in its place")
        if not _is_known(part, value):
            raise ModelError(f"{path}: {part} {NO_CODE}")


def _is_known(part: str, value: list[Any]) -> bool:
    """Whether [library, class] is code of diffusers or transformers, by the names under which diffusers saves it."""
    if len(value) != 2 or not all(isinstance(v, str) for v in value):
        return False
    library, kind = value
    if part in USED:
        return bool(library == USED[part][0])
    if library.split(".")[0] in _LIBRARIES:
        return True
    return library in _PIPELINE_MODULES and kind.endswith(_BESIDE_CLASSES)


def parts_beside(index: Mapping[str, Any]) -> list[str]:
    """Parts that the model has and that are left out: never loaded, never run."""
    return [part for part, value in index.items() if _is_part(part, value) and part not in USED and value[0]]


def without_parts_beside(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index of an exported folder: [null, null] for what is left out, and no safety checker is asked for."""
    plain = {part: [None, None] if _is_part(part, v) and part not in USED else v for part, v in index.items()}
    if "safety_checker" in plain or "requires_safety_checker" in plain:
        plain["requires_safety_checker"] = False
    return {key: value for key, value in plain.items() if key != "_name_or_path"}


def _is_part(part: str, value: Any) -> bool:
    return _is_entry(value) and not part.startswith("_")


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)
