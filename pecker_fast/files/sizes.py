"""What a network's config asks for at least, against what the headers of its weights hold: found before anything is built.

The counts are lower bounds that hold for every network of its kind, cheap to make and far below what a damaged config asks
for. That each tensor fits is checked afterwards, when building is known to be cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pecker_fast.errors import ModelError
from pecker_fast.files.reading import tensor_shapes
from pecker_fast.files.weights import WEIGHTS_NAME, weight_files


class Size(NamedTuple):
    """Tensors, and numbers in them."""

    tensors: int
    numbers: int


def size_of_shapes(shapes: Iterable[Sequence[int]]) -> Size:
    sizes = [math.prod(shape) for shape in shapes]
    return Size(len(sizes), sum(sizes))


def size_of_weights(folder: Path, name: str = WEIGHTS_NAME) -> Size:
    """What the weights of one module hold, from the headers of their files. Raises ModelError."""
    return size_of_shapes(
        shape for file in weight_files(folder, name) for shape in tensor_shapes(file, error=ModelError).values()
    )


def check_size(path: Path, config: Mapping[str, Any], kind: str, held: Size) -> None:
    """Raise ModelError where the config at `path` (values checked, kind as in `CONFIGS`) asks for more than is `held`."""
    least = _LEAST[kind](config)
    for what, asked, found in zip(Size._fields, least, held):
        if asked > found:
            raise ModelError(
                f"{path}: asks for a network of at least {asked:,} {what}; its weights hold {found:,}: the two do not "
                "belong together, or one is damaged"
            )


def _blocks(config: Mapping[str, Any], layers: int, widths: tuple[int, ...], up: bool) -> Size:
    """The residual layers of a side, and the text layers of those blocks that attend to text."""
    widths = config.get("block_out_channels", widths)
    types = config.get("up_block_types" if up else "down_block_types", ())
    each = config.get("layers_per_block", layers)
    deep = (config.get("reverse_transformer_layers_per_block") if up else None) or config.get(
        "transformer_layers_per_block", 1
    )
    if up:
        reversed_too = config.get("reverse_transformer_layers_per_block") is None
        widths, each = widths[::-1], each[::-1] if isinstance(each, list) else each
        deep = deep[::-1] if isinstance(deep, list) and reversed_too else deep
    tensors = numbers = 0
    for place, (width, kind) in enumerate(zip_longest(widths, types, fillvalue="")):
        residual = _at(each, place) + up
        tensors += 4 * residual  # two convolutions
        numbers += 9 * residual * int(width or 0) ** 2  # the second of them
        if "CrossAttn" in kind:
            many = _at(deep, place)
            tensors += 10 * (sum(many) if isinstance(many, list) else residual * many) * ("Simple" not in kind)
    return Size(tensors, numbers)


def _at(value: Any, place: int) -> Any:
    return (value[place] if place < len(value) else 0) if isinstance(value, list) else value


def _unet(config: Mapping[str, Any]) -> Size:
    sides = [_blocks(config, 2, (), up) for up in (False, True)]
    return Size(sum(s.tensors for s in sides), sum(s.numbers for s in sides))


def _vae(config: Mapping[str, Any]) -> Size:
    sides = [_blocks(config, 1, (64,), up) for up in (False, True)]
    return Size(sum(s.tensors for s in sides), sum(s.numbers for s in sides))


def _text_encoder(config: Mapping[str, Any]) -> Size:
    """As CLIPTextConfig's defaults where a key is missing."""
    width, inner = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    layers, rows = config.get("num_hidden_layers", 12), config.get("vocab_size", 49408)
    rows += config.get("max_position_embeddings", 77)
    return Size(16 * layers + 4, rows * width + layers * (4 * width**2 + 2 * width * inner))


_LEAST: dict[str, Callable[[Mapping[str, Any]], Size]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "text encoder": _text_encoder,
}
