"""How much memory a run will take, found before anything is loaded, and how much an iteration took."""

from pecker_fast.account.memory.measured import Peak, alive, measured_peak
from pecker_fast.account.memory.prediction import DECODED_AT_ONCE, ITERATION, Prediction, enough, predict, size

__all__ = ["DECODED_AT_ONCE", "ITERATION", "Peak", "Prediction", "alive", "enough", "measured_peak", "predict", "size"]
