"""Where tensors live and how an iteration runs on them. `local` is one process; sharded engines stand beside it."""

from pecker_fast.engine.adversary import Attacks
from pecker_fast.engine.begin import begin_anchor, begin_pool, edit
from pecker_fast.engine.finite import FiniteGuard
from pecker_fast.engine.graph import require_gpu
from pecker_fast.engine.inputs import Inputs
from pecker_fast.engine.local import LocalEngine
from pecker_fast.engine.state import TrainState, blend_average, start_ema

__all__ = [
    "Attacks",
    "FiniteGuard",
    "Inputs",
    "LocalEngine",
    "TrainState",
    "begin_anchor",
    "begin_pool",
    "blend_average",
    "edit",
    "require_gpu",
    "start_ema",
]
