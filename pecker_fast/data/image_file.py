"""One image of the user's, opened with Pillow: PNG, JPEG, WebP or BMP, whatever its name says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pecker_fast.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_PIXELS = 1 << 25
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 lie on their side


def header(image: Any) -> tuple[tuple[int, int], str]:
    """(width, height) as the image is shown, and its mode."""
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.size[::-1] if turned else image.size), image.mode


def upright_on_white(image: Any) -> Any:
    """The image turned as its EXIF data say, and on white where it is transparent."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def with_image(file: Path, use: Callable[[Any], Any]) -> Any:
    """`use` of the opened PIL image; whatever Pillow finds wrong with the file raises `DataError`."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > IMAGE_PIXELS:
                    raise DataError(f"{file}: {image.width}×{image.height} pixels, more than {IMAGE_PIXELS} in all")
                if image.mode in ("I", "F") or image.mode.startswith("I;"):
                    raise DataError(f"{file}: mode {image.mode}, 8 bits a channel expected")
                return use(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise DataError(f"{file}: not a readable PNG, JPEG, WebP or BMP image ({error})") from error
