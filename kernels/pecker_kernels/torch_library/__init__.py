"""The operations as `torch.ops.pecker.*`: schemas, shapes for tracing, derivatives."""

from . import adam as adam
from . import norm as norm
from . import scores as scores
from . import wgrad as wgrad
