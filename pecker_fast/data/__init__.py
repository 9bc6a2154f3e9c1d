"""Data sets that `pretrain` reads, and pictures of shapes that are drawn here. `train` never looks at either."""

from pecker_fast.data.datasets import Dataset, as_channels, forget_images
from pecker_fast.data.own_images import captioned_images, class_images
from pecker_fast.data.shapes import ATTRIBUTES, TEMPLATES, caption, captions, random_words, render

__all__ = [
    "ATTRIBUTES",
    "TEMPLATES",
    "Dataset",
    "as_channels",
    "caption",
    "captioned_images",
    "captions",
    "class_images",
    "forget_images",
    "random_words",
    "render",
]
