"""Sizes of the released Stable Diffusion networks, as diffusers writes them in config.json: facts, no weights."""

from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import ModelError

FOLDER = Path(__file__).parent
PREDICTION_TYPES = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}  # sd21: the 768-v model
TOKENS = 77  # length of a text embedding of all of them


def names() -> list[str]:
    """Known architectures, such as "sd15_unet" and "sdxl_vae"."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def architecture(name: str) -> dict[str, Any]:
    """The diffusers config of a network; `_class_name` tells its class. Raises ModelError naming those there are."""
    if name not in names():
        raise ModelError(f"architecture {name[:80]!r} is unknown (one of {', '.join(names())})")
    return files.read_json(FOLDER / f"{name}.json", error=ModelError)
