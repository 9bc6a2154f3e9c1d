"""Where tensors live and how an iteration runs on them. `local` is one process; sharded engines stand beside it."""

from pecker_fast.engine.inputs import Inputs
from pecker_fast.engine.local import LocalEngine
from pecker_fast.engine.state import TrainState

__all__ = ["Inputs", "LocalEngine", "TrainState"]
