"""θ and ψ sharded over many processes by DeepSpeed ZeRO. Importing it imports no DeepSpeed."""

from pecker_fast.engine.zero.engine import ZeroEngine
from pecker_fast.engine.zero.network import Sharded
from pecker_fast.engine.zero.settings import check_recipe, require_deepspeed
from pecker_fast.engine.zero.state import ZeroState

__all__ = ["Sharded", "ZeroEngine", "ZeroState", "check_recipe", "require_deepspeed"]
