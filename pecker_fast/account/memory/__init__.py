"""How much memory a run will take, found before anything is loaded, and how much an iteration took."""

from pecker_fast.account.memory.fitting import predict_fit
from pecker_fast.account.memory.measured import Peak, alive, measured_peak
from pecker_fast.account.memory.networks import build
from pecker_fast.account.memory.prediction import (
    DECODED_AT_ONCE,
    ITERATION,
    Prediction,
    TooLarge,
    enough,
    lighter_keys,
    predict,
    size,
)

__all__ = [
    "DECODED_AT_ONCE",
    "ITERATION",
    "Peak",
    "Prediction",
    "TooLarge",
    "alive",
    "build",
    "enough",
    "lighter_keys",
    "measured_peak",
    "predict",
    "predict_fit",
    "size",
]
