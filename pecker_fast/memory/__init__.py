"""How much memory a run will take, found before anything is loaded, and how much an iteration took."""

from pecker_fast.memory.measured import Peak, alive, measured_peak
from pecker_fast.memory.prediction import DECODED_AT_ONCE, Prediction, enough, predict

__all__ = ["DECODED_AT_ONCE", "Peak", "Prediction", "alive", "enough", "measured_peak", "predict"]
