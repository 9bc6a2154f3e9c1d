"""A whole iteration as one CUDA graph (`engine.cuda_graph`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pecker_fast.engine.inputs import Inputs
from pecker_fast.engine.state import TrainState
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import Recipe

EAGER = 3  # iterations that build kernels, the optimizers' state and the tables of their launches

Body = Callable[[Inputs], dict[str, Tensor]]


def require_gpu(recipe: Recipe, device: torch.device) -> None:
    """Raises RecipeError where the recipe asks for CUDA graphs and there is no GPU."""
    if recipe.engine.cuda_graph and device.type != "cuda":
        raise RecipeError("engine.cuda_graph: needs a GPU; leave it out on this machine")


class IterationGraph:
    """Both steps, the optimizers and the average: captured once, then launched as one.

    The first iterations with a state and a mask run eagerly; inputs are copied to where the captured iteration read its own.
    Learning rates and step counters live on the device. A new mask, update rule or stage starts again.
    """

    def __init__(self) -> None:
        self._start_over(())

    def _start_over(self, key: tuple[Any, ...]) -> None:
        self._key = key
        self._eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Inputs | None = None
        self._losses: dict[str, Tensor] = {}
        self._images = 0

    def __call__(self, body: Body, state: TrainState, inputs: Inputs) -> dict[str, Tensor]:
        key = (state, state.updates, state.mask)
        if len(key) != len(self._key) or any(a is not b for a, b in zip(key, self._key)):
            self._start_over(key)
        if self._eager < EAGER:
            self._eager += 1
            return body(inputs)
        if self._graph is None or self._inputs is None:
            before, graph = state.images, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._losses = body(inputs)  # counts its images here, and computes nothing yet
            self._graph, self._inputs, self._images = graph, inputs, state.images - before
        else:
            self._inputs.copy_(inputs)
            state.images += self._images
        self._graph.replay()
        return {name: loss.clone() for name, loss in self._losses.items()}  # the next launch writes to the same place
