"""The iteration as the engine runs it, on networks without memory: what would be alive when."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from pecker_kernels import MaskedAdam, SaliencyMask
from pecker_kernels.mask.bits import popcount
from torch import Tensor

from pecker_fast.account.iteration import unique_bytes
from pecker_fast.account.memory.measured import LiveMode
from pecker_fast.conditions import Conditions
from pecker_fast.engine import Attacks, FiniteGuard, LocalEngine, TrainState
from pecker_fast.forgetting import (
    Adversary,
    Anchor,
    Attack,
    Batch,
    Pool,
    Vectors,
    excluded,
    get_method,
    share_of_rest,
)
from pecker_fast.networks import AdaptedUNet, Denoiser
from pecker_fast.recipe import Recipe

Gradients = Any
CPU = torch.device("cpu")
PIECES = 2  # of a batch that passes in pieces: all further ones are as the second, whose gradients join the first's


class _Trusting(FiniteGuard):
    """Gradients without values are not looked at."""

    def check(self, where: str, what: str, grads: Gradients, named: Any) -> None:
        pass

    def note(self, optimizer: MaskedAdam, update: int) -> None:
        pass


class _Attacks(Attacks):
    """Attacks that have shapes alone; no vector starts afresh. size: samples of each."""

    size = 1

    def restart(self, state: TrainState) -> None:
        pass

    def draw(self, state: TrainState) -> tuple[Attack, ...]:
        if state.adversary is None:
            return ()
        z = torch.empty(self.size, *state.generator.sample_shape)
        c, t = (torch.zeros(self.size, dtype=torch.long) for _ in range(2))
        one = Attack(z, torch.empty_like(z), c, t)
        return (one,) * self.recipe.adversary.steps


class Rehearsal(LocalEngine):
    """The engine itself. Its draws have shapes alone, its optimizers have their state and take no step.

    device: "cuda" averages as a GPU does, by a copy of the changes. The tensors pretend to be on the CPU in any case.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        plain = recipe.engine.model_copy(update={"cuda_graph": False, "compile": "none", "threads": 0})
        nobody = Conditions((0,), (0,), (0,), (0,))
        super().__init__(recipe.model_copy(update={"engine": plain}), nobody, CPU, late=device == "cuda")
        self.guard = _Trusting(CPU, late=device == "cuda")
        self.gradient_bytes = 0  # the most that was handed to one step
        most = PIECES * recipe.engine.micro_batch or recipe.batch_size
        self.batch_size = min(recipe.batch_size, most)
        attacks = _Attacks(recipe, nobody, self)
        attacks.size = max(1, round((recipe.adversary.batch or recipe.batch_size) / self.repeats))
        self.attacks = attacks

    def draw(self, state: TrainState, role: str, branch: str) -> Batch:
        return self._batch(self.batch_size, state, role, branch)

    @staticmethod
    def _batch(n: int, state: TrainState, role: str, branch: str) -> Batch:
        z = torch.empty(n, *state.generator.sample_shape)
        t, c = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
        return Batch(z, t, torch.empty_like(z), t, c, c, torch.zeros_like(c) if branch == "forget" else c)

    @property
    def repeats(self) -> float:
        """What a rehearsed batch is to be multiplied by."""
        return self.recipe.batch_size / self.batch_size

    def rest(self, state: TrainState) -> None:
        """Give the optimizers the state they have after a step, and let them take none."""
        for name, optimizer in state.optimizers.items():
            for group in optimizer.param_groups:
                group["dense_moments"] |= name != "score" and state.updates.separate  # as steps with masked_grads do
            for name_of, p, group in optimizer._named():
                optimizer._init_state(p, optimizer._lanes_of(p, name_of), group)
            optimizer.step = self._stepper(optimizer)  # type: ignore[method-assign]

    def _stepper(self, optimizer: MaskedAdam) -> Any:
        def step(masked_grads: Any = None, closure: Any = None, compact_grads: Any = None) -> None:
            given = [p.grad for group in optimizer.param_groups for p in group["params"]]
            given += [*(masked_grads or ()), *(compact_grads or ())]
            self.gradient_bytes = max(self.gradient_bytes, unique_bytes(given))

        return step

    def plan(self, state: TrainState) -> None:
        """Decide which weight gradients are skipped; it reads the mask, so it goes before everything without values."""
        for phase in state.updates.phases:
            for group in [[branch] for branch in phase] if state.updates.separate else [list(phase)]:
                self.live.of(state, group)

    def phases(self, state: TrainState, live: LiveMode) -> dict[str, int]:
        """Peak bytes of each phase of an iteration."""
        peaks: dict[str, int] = {}
        with live:
            live.peak_since()
            inputs = self.inputs(state)
            if state.adversary is not None:
                self.attacks.step(state, inputs.attacks)
                peaks["adversary's step"] = live.peak_since()
            if state.score is not None:
                self.score_step(state, inputs)
                self._forget_gradients(state.score)
                peaks["score step"] = live.peak_since()
            self.generator_step(state, inputs)
            self._forget_gradients(state.score)
            peaks["generator step"] = live.peak_since()
            if state.ema is not None:
                self.average(state, inputs)
                peaks["average"] = live.peak_since()
        return peaks

    @staticmethod
    def _forget_gradients(network: Any) -> None:
        for _, p in () if network is None else network.named_parameters():
            p.grad = None

    def saliency(self, state: TrainState, live: LiveMode) -> int:
        """Peak bytes of one batch of the saliency pass, with the scores it is added to."""
        recipe = self.recipe
        with live, self.autocast():
            live.peak_since()
            scores = [torch.empty(p.shape) for _, p in state.generator.whole_parameters()]
            more = [torch.empty_like(s) for s in scores] if recipe.mask.contrast else []
            found = self.saliency_pass(state)
            with found.passing():
                found.loss(self._batch(recipe.batch_size, state, "generator", "forget"), "forget").backward()
            del scores, more
            del found
        self._forget_gradients(state.generator)
        self._forget_gradients(state.score)
        return live.peak_since()


def planned_adversary(recipe: Recipe, generator: Denoiser) -> Adversary | None:
    """The recipe's adversary without values; see `Adversary`."""
    if not recipe.uses_adversary:
        return None
    options, config = recipe.adversary, generator.config
    width = getattr(config, "cross_attention_dim", None)
    if width is None:
        shape = tuple(generator.base.class_embedding.weight.shape[1:])
    else:
        shape = (options.tokens, width if isinstance(width, int) else width[0])
    images = torch.empty(options.samples, *generator.sample_shape)
    vectors = Vectors.start(torch.empty(options.conditions, *shape))
    covers = torch.empty_like(images if options.half_way else images[:0])
    adversary = Adversary(vectors, images, torch.zeros(options.samples, dtype=torch.long), covers, recipe.seed)
    adversary.z = torch.empty_like(images)  # drawing it takes values
    return adversary


def planned_pool(recipe: Recipe, generator: Denoiser) -> Pool | None:
    """The images of a method that leaves a model of many steps, without values."""
    branches = get_method(recipe.method).pools(recipe)
    if not branches:
        return None
    n = recipe.images.samples
    images = {branch: torch.empty(n, *generator.sample_shape) for branch in branches}
    c = {branch: torch.zeros(n, dtype=torch.long) for branch in branches}
    return Pool(images, c, c)


def planned_anchor(recipe: Recipe, generator: Denoiser) -> Anchor | None:
    """The springs of a method that holds weights, without values."""
    if not get_method(recipe.method).anchored:
        return None
    parameters = [p for _, p in generator.named_parameters()]
    start, weight = ([torch.empty(p.shape) for p in parameters] for _ in range(2))
    return Anchor(parameters, start, weight)


def planned_mask(recipe: Recipe, generator: Denoiser) -> SaliencyMask | None:
    """A mask of the recipe's size. Which weights it keeps is not known yet: each tensor keeps its share, and with
    `structure: tensor` whole tensors are kept evenly over the network. A threshold may keep everything, so it does here."""
    if not recipe.uses_mask:
        return None
    options = recipe.mask
    density = 1.0 if options.threshold is not None else options.density
    named = generator.whole_parameters()
    left_out = excluded(recipe, [name for name, _ in named], generator)
    rest = sum(p.numel() for name, p in named if name not in left_out)
    density = share_of_rest(recipe, sum(p.numel() for _, p in named), rest) if density < 1 else density
    counts: dict[str, int] = {}
    seen = kept = 0
    for name, p in named:
        n = p.numel()
        if name in left_out:
            counts[name] = 0
            continue
        seen += n
        if options.structure == "tensor":
            count = n if kept < density * seen else 0
        elif options.structure == "element":
            count = round(density * seen) - kept
        else:
            size = n // p.shape[0]
            count = min(n, max(0, round((density * seen - kept) / size)) * size)
        counts[name] = min(n, max(0, count))
        kept += counts[name]
    bits = {name: _first(p.numel(), counts[name]) for name, p in named}
    # rows stand for tiles: as many weights, and gradients of about the same size
    structure = "row" if options.structure == "tile" else options.structure
    return PlannedMask(bits, {name: p.shape for name, p in named}, structure=structure)


def limit_adapters(generator: Denoiser, mask: SaliencyMask | None) -> None:
    """As `TrainState.limit` does, by how much of each tensor the mask keeps."""
    if mask is None or not isinstance(generator.unet, AdaptedUNet):
        return
    for name, adapter in generator.unet.adapters().items():
        if not mask.count_of(f"{name}.weight"):
            generator.unet.drop(name)
            continue
        if mask.structure == "tensor":
            continue
        whole = adapter.product().shape
        adapter.kept = torch.empty(whole if mask.structure in ("element", "tile") else whole[:1], dtype=torch.bool)


class PlannedMask(SaliencyMask):
    """Its bits may be copied to where there is no memory, and are not worth hashing."""

    digest = "planned"  # type: ignore[assignment]

    def __init__(self, bits: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], structure: str) -> None:
        super().__init__(bits, shapes, structure=structure)
        self._kept = {name: popcount(packed) for name, packed in self.bits.items()}

    def count_of(self, name: str) -> int:
        return self._kept[name]

    def clone(self) -> SaliencyMask:
        twin = copy(self)
        twin.bits = {name: packed.clone() for name, packed in self.bits.items()}
        return twin


def _first(n: int, count: int) -> Tensor:
    """The bits of the first `count` of n weights."""
    bits = torch.zeros((n + 7) // 8, dtype=torch.uint8)
    bits[: count // 8] = 255
    if count % 8:
        bits[count // 8] = (1 << count % 8) - 1
    return bits
