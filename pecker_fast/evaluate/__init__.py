"""Evaluation: the judge, unlearning accuracy and the distribution metrics. torchmetrics is imported at first use."""

from pecker_fast.evaluate.canvas import canvas_prompts, unlearncanvas
from pecker_fast.evaluate.classes import Sampler, evaluate
from pecker_fast.evaluate.classifiers import Classifier, PatchMixer, SmallClassifier
from pecker_fast.evaluate.clip import clip_score, load_clip
from pecker_fast.evaluate.concepts import PROTOCOLS, TABLE_HEADER, celebrity, i2p, protocol_table
from pecker_fast.evaluate.detector import load_detector
from pecker_fast.evaluate.drawing import Prompt
from pecker_fast.evaluate.intervals import wilson
from pecker_fast.evaluate.judge import Judge, Reference, load_judge, save_judge
from pecker_fast.evaluate.metrics import fid, fid_floor, inception_score, precision_recall
from pecker_fast.evaluate.obedience import word_figures
from pecker_fast.evaluate.second import disagreement, load_second_judge
from pecker_fast.evaluate.verdict import Interval, Verdict, share, verdict_of
from pecker_fast.evaluate.words import WordJudge, load_word_judge, save_word_judge

__all__ = [
    "PROTOCOLS",
    "TABLE_HEADER",
    "Classifier",
    "Interval",
    "Judge",
    "PatchMixer",
    "Prompt",
    "Reference",
    "Sampler",
    "SmallClassifier",
    "Verdict",
    "WordJudge",
    "canvas_prompts",
    "celebrity",
    "clip_score",
    "disagreement",
    "evaluate",
    "fid",
    "fid_floor",
    "i2p",
    "inception_score",
    "load_clip",
    "load_detector",
    "load_judge",
    "load_second_judge",
    "load_word_judge",
    "precision_recall",
    "protocol_table",
    "save_judge",
    "save_word_judge",
    "share",
    "unlearncanvas",
    "verdict_of",
    "wilson",
    "word_figures",
]
