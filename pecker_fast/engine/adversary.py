"""The attacking side of an iteration: free vectors beside θ, where they start afresh, and their steps while θ stands still."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast.conditions import Conditions
from pecker_fast.engine.state import TrainState
from pecker_fast.forgetting import (
    Adversary,
    Attack,
    Vectors,
    attack_of,
    draw_pool,
    error_gradient,
    first_starts,
    pieces_of,
    restarting,
    start_of,
)
from pecker_fast.machine import part
from pecker_fast.networks import Denoiser, TextDenoiser
from pecker_fast.recipe import Recipe


class Host(Protocol):
    """What an engine does for attacks: whatever depends on where tensors live."""

    def autocast(self) -> AbstractContextManager[None]: ...

    def attention(self) -> AbstractContextManager[object]: ...

    def own_vectors(self, network: Denoiser, c: Tensor) -> Tensor:
        """`Denoiser.own_vectors` of θ."""
        ...

    def share_of(self, attack: Attack) -> Attack:
        """What of an attack is this process's work."""
        ...

    def sum_of(self, state: TrainState, gradient: Tensor) -> Tensor:
        """The gradient of the whole attack. Raises NonFiniteError where it is not finite."""
        ...


class Attacks:
    """What the recipe's adversary does with a state; nothing where the state has none. All of it takes all ranks."""

    def __init__(self, recipe: Recipe, conditions: Conditions, host: Host) -> None:
        self.recipe, self.conditions, self.host = recipe, conditions, host
        self._placed: tuple[Denoiser, Denoiser] | None = None

    def begin(self, state: TrainState, poll: Callable[[], object] = lambda: None) -> None:
        """At the start of the forget stage: images by θ as it is, and vectors where they start. Nothing where the recipe has no
        adversary."""
        if not self.recipe.uses_adversary:
            return
        network = self.network(state)
        with self.host.autocast():
            images, c, covers = draw_pool(self.recipe, self.conditions, network, poll)
        values = first_starts(self.recipe, self.conditions, lambda c: self.host.own_vectors(network, c), c.device)
        state.adversary = Adversary(Vectors.start(values), images, c, covers, self.recipe.seed)

    def network(self, state: TrainState) -> Denoiser:
        """θ, of whose prompts it is known where free tokens stand."""
        generator = state.generator
        if not isinstance(generator, TextDenoiser):
            return generator
        if self._placed is None or self._placed[0] is not generator:
            forget, cover = self.conditions.forget, self.conditions.cover
            self._placed = generator, generator.with_places(forget, cover, self.recipe.adversary.tokens)
        return self._placed[1]

    def drawing(self, state: TrainState) -> Denoiser:
        """θ as it draws samples: it knows the vectors."""
        if state.adversary is None:
            return state.generator
        return self.network(state).with_free(state.adversary.vectors.values)

    def restart(self, state: TrainState) -> None:
        """Before an iteration: the vector whose turn it is starts afresh."""
        adversary = state.adversary
        turn = None if adversary is None else restarting(self.recipe, state.step)
        if adversary is None or turn is None:
            return
        network, device = self.network(state), adversary.c.device
        value = start_of(self.recipe, self.conditions, lambda c: self.host.own_vectors(network, c), *turn, device)
        adversary.vectors.restart_(turn[0], value[0])

    @part("draws")
    def draw(self, state: TrainState) -> tuple[Attack, ...]:
        """What the steps of the present iteration are taken on."""
        adversary, recipe = state.adversary, self.recipe
        if adversary is None:
            return ()
        network, steps = self.network(state), range(recipe.adversary.steps)
        whole = (attack_of(recipe, self.conditions, adversary, network, state.step, n) for n in steps)
        return tuple(map(self.host.share_of, whole))

    def step(self, state: TrainState, attacks: tuple[Attack, ...] | None = None) -> dict[str, Tensor]:
        """The vectors step towards drawing again what is forgotten; θ stands still. attacks: None = drawn here, the same."""
        adversary = state.adversary
        if adversary is None:
            return {}
        errors = []
        with part("adversary"), self.host.attention(), state.generator.frozen():
            for attack in self.draw(state) if attacks is None else attacks:
                with self.host.autocast():
                    gradient, found = self._gradient(state, attack)
                adversary.vectors.step_(self.host.sum_of(state, gradient), self.recipe.adversary.rate)
                errors.append(found.mean())
        return {"adversary_error": torch.stack(errors).mean()}

    @contextmanager
    def undone(self, state: TrainState) -> Iterator[None]:
        """The vectors are afterwards as they were before."""
        held = state.adversary.vectors.tensors() if state.adversary is not None else {}
        before = {name: tensor.clone() for name, tensor in held.items()}
        try:
            yield
        finally:
            for name, tensor in held.items():
                tensor.copy_(before[name])

    def pool_flops(self, state: TrainState) -> float:
        """FLOPs of `begin`: some of its samples are drawn again and counted, all cost the same."""
        if state.adversary is None:
            return 0.0
        fewest = self.recipe.adversary.model_copy(update={"samples": 1})
        one = self.recipe.model_copy(update={"adversary": fewest})
        with self.host.autocast(), FlopCounterMode(display=False) as counter:
            count = len(draw_pool(one, self.conditions, self.network(state))[1])
        return float(counter.get_total_flops()) / count * len(state.adversary.c)

    def _gradient(self, state: TrainState, attack: Attack) -> tuple[Tensor, Tensor]:
        """(gradient of all vectors, error of each sample), in pieces."""
        assert state.adversary is not None
        size = pieces_of(self.recipe)
        gradients, errors = [], []
        for start in range(0, len(attack.codes), size):
            piece = attack.part(slice(start, start + size))

            def error(theta: Denoiser, piece: Attack = piece) -> Tensor:
                return piece.error(theta, self.recipe.one_step)

            gradient, found = error_gradient(state.adversary.vectors, self.network(state), error)
            gradients.append(gradient)
            errors.append(found)
        return (gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(0)), torch.cat(errors)
