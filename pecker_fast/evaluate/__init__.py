"""Evaluation: the judge, unlearning accuracy and the distribution metrics. torchmetrics is imported at first use."""

from pecker_fast.evaluate.classes import Sampler, evaluate
from pecker_fast.evaluate.judge import Judge, Reference, SmallClassifier, load_judge, save_judge
from pecker_fast.evaluate.metrics import fid, fid_floor, inception_score, precision_recall

__all__ = [
    "Judge",
    "Reference",
    "Sampler",
    "SmallClassifier",
    "evaluate",
    "fid",
    "fid_floor",
    "inception_score",
    "load_judge",
    "precision_recall",
    "save_judge",
]
