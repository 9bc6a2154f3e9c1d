"""Data sets that `pretrain` reads, and pictures of shapes that are drawn here. `train` never looks at either."""

from pecker_fast.data.datasets import Dataset, forget_images
from pecker_fast.data.shapes import ATTRIBUTES, TEMPLATES, caption, captions, random_words, render

__all__ = ["ATTRIBUTES", "TEMPLATES", "Dataset", "caption", "captions", "forget_images", "random_words", "render"]
