"""A state that nothing can go on from is not saved, so that it never takes the place of one that can."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pecker_kernels import MaskedAdam, Shards
from torch import Tensor

from pecker_fast.engine import TrainState
from pecker_fast.engine.zero import ZeroState
from pecker_fast.errors import NonFiniteError
from pecker_fast.machine.ranks import ALONE, Ranks
from pecker_fast.networks import are_weights

Named = Iterator[tuple[str, Tensor]]
LARGEST_MOMENT = 1e37  # no gradient that a step is taken on has a larger square


def check_state(state: TrainState, ranks: Ranks = ALONE) -> None:
    """Raises NonFiniteError on all ranks where one of them holds weights, an average or moments that are not finite; of weights
    and averages absurd numbers, which no network is loaded with, are none either. Takes all ranks."""
    with torch.no_grad():
        mine = next(_bad(state), None)
    found = [(rank, name) for rank, name in enumerate(ranks.everyones(mine)) if name is not None]
    if not found:
        return
    rank, name = found[0]
    where = f"{state.stage} step {state.step}" + (f", rank {rank}" if isinstance(state, ZeroState) else "")
    raise ranks.shared(
        NonFiniteError(
            f"{where}: {name} holds NaN, infinity or absurd numbers; nothing was saved and checkpoints are as they were; "
            "start over (resume=never) with a lower lr or optimizer.clip_value"
        )
    )


def _bad(state: TrainState) -> Iterator[str]:
    """What of this rank's state is not finite."""
    for name, tensor in _weights(state):
        if not are_weights(tensor):
            yield name
    for name, optimizer in state.optimizers.items():
        for what, moment in _moments(state, name, optimizer):
            if not are_weights(moment, LARGEST_MOMENT):
                yield what


def _weights(state: TrainState) -> Named:
    if state.adversary is not None:
        yield "adversary tensor values", state.adversary.vectors.values
    if isinstance(state, ZeroState):
        for name, network in state.networks.items():
            yield from _pieces(f"{name} tensor", network.shards, network.partition.detach())
        for average in (state.ema or {}).values():
            yield from _pieces("average tensor", state.networks["generator"].shards, average)
        return
    score = [] if state.score is None else [("score network", state.score)]
    for name, denoiser in [("generator", state.generator), *score]:
        for key, tensor in denoiser.state_dict().items():
            if tensor.is_floating_point():
                yield f"{name} tensor {key}", tensor
    for key, average in (state.ema or {}).items():
        yield f"average tensor {key}", average


def _moments(state: TrainState, name: str, optimizer: MaskedAdam) -> Named:
    """Moments by parameter; of a rank's vector by tensor, or, where they are compact, as a whole."""
    for group in optimizer.param_groups:
        for key, p in zip(group["param_names"], group["params"]):
            for moment, tensor in optimizer.state.get(p, {}).items():
                if not isinstance(state, ZeroState) or tensor.numel() == 1:
                    yield f"optimizer {name}, {moment} of tensor {key}", tensor
                elif tensor.shape == p.shape:
                    shards = state.networks["score" if name == "score" else "generator"].shards
                    yield from _pieces(f"optimizer {name}, {moment} of tensor", shards, tensor)
                else:
                    yield f"optimizer {name}, {moment}", tensor


def _pieces(what: str, shards: Shards, vector: Tensor) -> Named:
    """A rank's vector by tensor, without the padding that nobody writes."""
    for piece in shards.pieces:
        yield f"{what} {piece.name}", shards.view(vector, piece)
