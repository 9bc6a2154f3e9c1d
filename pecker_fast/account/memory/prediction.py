"""The memory a recipe will take, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pecker_kernels import SaliencyMask
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from pecker_fast.account.iteration import optimizer_bytes, unique_bytes
from pecker_fast.account.memory.measured import LiveMode, alive
from pecker_fast.account.memory.networks import Blank, Kernels, blank_schedule, build
from pecker_fast.account.memory.rehearsal import (
    Rehearsal,
    limit_adapters,
    planned_adversary,
    planned_anchor,
    planned_mask,
    planned_pool,
)
from pecker_fast.engine import TrainState, start_ema
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting import Dense, UpdateRule, adam, get_method
from pecker_fast.networks import Denoiser, with_adapters
from pecker_fast.recipe import Recipe

DECODED_AT_ONCE = 1  # latents that pass through the VAE together
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 1 << 30
TRIES, TRIES_OF_LARGE = 6, 3  # remedies that are tried: each takes as long as the forecast, of a large network a minute
LARGE_BYTES = 1 << 30  # of the teacher's weights
Again = Callable[[list[str]], "Prediction | None"]  # overrides as on the command line
ITERATION = ("adversary's step", "score step", "generator step", "average")  # the phases of one


@dataclass(frozen=True)
class Prediction:
    """parts: bytes of each kind; "activations" are what the largest phase holds beyond the others, so they add up to
    `peak_bytes`. phases: peak bytes of each phase, all that is alive then. remedies: keys of the recipe that would take
    less, each with what it makes smaller ("state" or "activations"). flops: of an iteration, by stage."""

    parts: dict[str, int]
    phases: dict[str, int]
    remedies: tuple[tuple[str, str], ...] = ()
    flops: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())

    @property
    def state_bytes(self) -> int:
        """What is there whatever the size of a batch."""
        return self.peak_bytes - self.parts["activations"]

    def table(self) -> list[tuple[str, str]]:
        """(part, size) rows for printing, then the phases and the peak."""
        rows = [(name, size(n)) for name, n in self.parts.items() if n]
        rows += [(f"peak of the {name}", size(n)) for name, n in self.phases.items()]
        return [*rows, ("peak", size(self.peak_bytes))]


def size(n: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / (1 << 20):.1f} MiB"


class TooLarge(RecipeError):
    """A recipe that will not fit. table: the parts and phases behind the message, as `Prediction.table`."""

    def __init__(self, message: str, table: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.table = table


def enough(prediction: Prediction, available_bytes: int, again: Again | None = None) -> None:
    """Raises RecipeError, with what is needed and how to need less, unless the prediction fits.

    again: predicts the recipe with other keys (None where they do not fit together); then every remedy named was tried, with
    its peak, the greatest gain first, and if none is enough alone how many of them are together.
    """
    if prediction.peak_bytes <= available_bytes:
        return
    largest = sorted(prediction.parts.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size(n)}" for name, n in largest)
    remedy = _tried(prediction, available_bytes, again) if again else _untried(prediction, available_bytes)
    raise TooLarge(
        f"memory: this recipe needs about {size(prediction.peak_bytes)} ({parts}), "
        f"{size(available_bytes)} are available; {remedy or 'it needs a larger device, or a smaller model'}",
        prediction.table(),
    )


def _untried(prediction: Prediction, available_bytes: int) -> str:
    useful = _useful(prediction, available_bytes)
    return f"try {', '.join(useful)}" if useful else ""


def _useful(prediction: Prediction, available_bytes: int) -> list[str]:
    """Remedies that may be enough: where the state alone is too large, no smaller batch helps."""
    state = prediction.state_bytes > available_bytes
    return [key for kind, key in prediction.remedies if kind == "state" or not state]


def _tried(prediction: Prediction, available_bytes: int, again: Again) -> str:
    peaks = {}
    tries = TRIES_OF_LARGE if prediction.parts.get("teacher", 0) > LARGE_BYTES else TRIES
    for key in _useful(prediction, available_bytes)[:tries]:
        key = _override(key)
        found = again([key])
        if found is not None and found.peak_bytes < prediction.peak_bytes:
            peaks[key] = found.peak_bytes
    order = sorted(peaks, key=peaks.__getitem__)
    if not order:
        return ""
    said = f"tried: {', '.join(f'{key} takes {size(peaks[key])}' for key in order)}"
    if peaks[order[0]] <= available_bytes:
        return said
    for count in range(2, len(order) + 1):
        found = again(order[:count])
        if found is not None and found.peak_bytes <= available_bytes:
            return f"{said}; together {' '.join(order[:count])} take {size(found.peak_bytes)}"
    return f"{said}; that is not enough, nor is all of it together"


def _override(remedy: str) -> str:
    """A remedy as a key that can be tried."""
    name, _, n = remedy.partition(" below ")
    return f"{name}={int(n) // 2}" if n else remedy


def predict(
    recipe: Recipe,
    unet_config: Mapping[str, Any],
    *,
    vae_config: Mapping[str, Any] | None = None,
    table_bytes: int = 0,
    device: str = "cpu",
    tokens: int = 77,
) -> Prediction:
    """Peak memory of a run of this recipe, before anything is loaded: the engine's own steps on networks without memory.

    unet_config, vae_config: diffusers configs. table_bytes: of the text embeddings. tokens: length of one. device: "cpu" or
    "cuda", for what is kept there (attention, norms under autocast, the average). Tensors alone: add what a library takes for
    itself, a CUDA context say, and what an allocator loses. CUDA graphs, torch.compile and evaluation are not in it. Raises
    ModelError for a config that diffusers cannot build.
    """
    setting = Settings(recipe)
    # where LocalEngine.autocast takes the unfused one
    fused = not (device == "cpu" and recipe.precision == "bf16")
    kernels = partial(Kernels, fused, device == "cuda" and recipe.precision == "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True), kernels():
        return _Plan(setting, unet_config, vae_config, table_bytes, device, tokens, kernels).prediction()


class Settings:
    """What the recipe says about memory."""

    def __init__(self, recipe: Recipe) -> None:
        engine = recipe.engine
        self.recipe = recipe
        self.weights = DTYPES[engine.weights]
        self.checkpointing = engine.checkpointing
        self.micro_batch = engine.micro_batch

    def remedies(self, batch_size: int) -> tuple[tuple[str, str], ...]:
        """See Prediction.remedies."""
        recipe = self.recipe
        split = batch_size > 1 and self.micro_batch != 1
        found = (
            (not self.checkpointing, "activations", "engine.checkpointing=true"),
            (split, "activations", "engine.micro_batch=1"),
            (recipe.precision == "fp32", "activations", "precision=bf16"),
            (recipe.one_step and recipe.score == "full", "state", "score=lora"),
            (_may_be_lora(recipe), "state", "student=lora"),
            (self.weights == torch.float32, "state", "engine.weights=bf16"),
            (recipe.uses_mask and recipe.update_rule != "salient_only", "state", "update_rule=salient_only"),
            (recipe.ema > 0, "state", "ema=0"),
            (batch_size > 1, "activations", f"batch_size below {batch_size}"),
        )
        return tuple((kind, key) for applies, kind, key in found if applies)


def _may_be_lora(recipe: Recipe) -> bool:
    """Whether adapters would do in the place of θ's weights, and everything else stay."""
    masked = recipe.uses_mask and (recipe.update_rule != "salient_only" or recipe.mask.refresh > 0)
    return recipe.facts.kind == "denoiser" and recipe.student == "full" and not recipe.engine.zero and not masked


def lighter_keys(recipe: Recipe) -> list[str]:
    """Keys of a recipe that take less memory, none of them tried."""
    return [key for _, key in Settings(recipe).remedies(recipe.batch_size)] or ["a smaller model"]


class _Plan:
    """The run of a recipe on networks without memory; made and used inside a FakeTensorMode."""

    def __init__(
        self, setting: Settings, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any] | None, table_bytes: int,
        device: str, tokens: int, kernels: Callable[[], Kernels],
    ) -> None:  # fmt: skip
        self.setting, self.recipe, self.table_bytes = setting, setting.recipe, table_bytes
        recipe = self.recipe
        again = kernels if setting.checkpointing else None
        make = partial(build, unet_config, setting.weights, again, recipe.engine.norms == "fused")
        self.teacher = Blank(make, blank_schedule(), recipe.engine.channels_last, tokens)
        self.generator = self._student()
        self.score: Denoiser | None = self.teacher.clone() if recipe.one_step else None
        if recipe.score == "lora":
            self.score = with_adapters(self.teacher, recipe.lora.rank, recipe.lora.targets)
        self.teacher.freeze()
        self.vae: nn.Module | None = None
        if vae_config is not None:
            self.vae = build(vae_config, torch.float32).requires_grad_(False)  # whatever the weights of the UNets
        self.engine = Rehearsal(recipe, device)
        self.mask = self._mask()
        limit_adapters(self.generator, self.mask)
        self.ema = start_ema(self.generator, recipe.ema)

    def _student(self) -> Denoiser:
        """θ: adapters stand on φ's own weights, or on a copy where θ starts elsewhere."""
        recipe = self.recipe
        if recipe.student == "full":
            return self.teacher.clone()
        start = self.teacher if recipe.generator is None else self.teacher.clone()
        return with_adapters(start, recipe.lora.rank, recipe.lora.targets)

    def _mask(self) -> SaliencyMask | None:
        with unset_fake_temporarily():
            mask = planned_mask(self.recipe, self.generator)
        if mask is None or mask.structure == "element":
            self.engine.live.wanted = False  # of an element mask hardly a row is dead
        return mask

    def _state(self, stage: str) -> TrainState:
        recipe, named = self.recipe, self.generator.named_parameters()
        if stage == "distill":
            updates: UpdateRule = Dense(recipe, named, None)
        else:
            updates = get_method(recipe.method).updates(recipe, named, self.mask)
        optimizer = None if self.score is None else adam(recipe, self.score.named_parameters(), recipe.lr.score)
        adversary = planned_adversary(recipe, self.generator) if stage == "forget" else None
        return TrainState(
            self.teacher, self.score, self.generator, optimizer, updates, self.ema, adversary=adversary, stage=stage,
            pool=planned_pool(recipe, self.generator), anchor=planned_anchor(recipe, self.generator),
        )  # fmt: skip

    def prediction(self) -> Prediction:
        phases: dict[str, int] = {}
        flops: dict[str, int] = {}
        scored = self.mask is not None and self.recipe.mask.source == "saliency"
        if self.recipe.facts.kind == "edit":
            return self._edited()
        if self.recipe.distill_steps:
            distill = self._rested("distill")
            live = self._live(distill)
            steps = self.engine.phases(distill, live)
            flops["distill"] = round(live.flops * self.engine.repeats)
            phases |= {f"distillation's {name}": n for name, n in steps.items()}
            del distill
        if scored and not self.recipe.mask.refresh:
            # optimizers have no state yet; the average of the stage before is still held
            state = self._state("forget")
            live = self._live(state)
            second = [torch.empty_like(average) for average in (self.ema or {}).values()]
            for tensor in second:
                live.live.see(tensor)
            phases["saliency pass"] = self.engine.saliency(state, live)
            del state, second
        state = self._rested("forget")
        live = self._live(state)
        if scored and self.recipe.mask.refresh:
            phases["saliency pass"] = self.engine.saliency(state, live)
        with unset_fake_temporarily():  # which rows are live is read off the bits
            self.engine.plan(state)
        before = live.flops
        phases |= self.engine.phases(state, live)
        flops["forget"] = round((live.flops - before) * self.engine.repeats)
        if self.vae is not None:
            phases["decoding"] = self._decoding(self.vae, state, live)
        phases = {name: n + self.table_bytes for name, n in phases.items()}
        parts = self._parts(state)
        parts["activations"] = max(phases.values()) - sum(parts.values())
        return Prediction(parts, phases, self.setting.remedies(self.recipe.batch_size), flops)

    def _edited(self) -> Prediction:
        """Of a method in closed form: two networks, and nothing that grows with a batch."""
        state = self._state("forget")
        parts = {
            name: n for name, n in self._parts(state).items() if name in ("teacher", "generator", "VAE", "text table")
        }
        return Prediction({**parts, "activations": 0}, {"edit": sum(parts.values())})

    def _rested(self, stage: str) -> TrainState:
        state = self._state(stage)
        self.engine.rest(state)
        return state

    def _live(self, state: TrainState) -> LiveMode:
        return LiveMode([*alive(state), *(self.vae.parameters() if self.vae is not None else ())])

    def _decoding(self, vae: Any, state: TrainState, live: LiveMode) -> int:
        """Samples of a copy of θ with the averaged weights, as images."""
        with live, torch.no_grad():
            live.peak_since()
            copy = [torch.empty_like(p) for _, p in state.generator.named_parameters()]
            n = min(DECODED_AT_ONCE, self.recipe.batch_size)
            dtype = next(vae.parameters()).dtype
            vae.decode(torch.empty(n, *state.generator.sample_shape, dtype=dtype), return_dict=False)
            del copy
        return live.peak_since()

    def _parts(self, state: TrainState) -> dict[str, int]:
        teachers = [p for _, p in self.teacher.named_parameters()]
        shared = set(map(id, teachers))  # what adapters on φ stand on is counted once

        def weights(network: Denoiser) -> int:
            held = [p for _, p in (*network.named_parameters(), *network.whole_parameters())]
            return unique_bytes([p for p in held if id(p) not in shared])

        return {
            "teacher": unique_bytes([*teachers]),
            "score network": 0 if self.score is None else weights(self.score),
            "generator": weights(self.generator),
            "VAE": unique_bytes(list(self.vae.parameters())) if self.vae is not None else 0,
            "text table": self.table_bytes,
            "score optimizer": 0 if state.score_optimizer is None else optimizer_bytes(state.score_optimizer),
            "generator optimizer": sum(map(optimizer_bytes, state.updates.optimizers.values())),
            "mask": unique_bytes(list(self.mask.bits.values())) if self.mask is not None else 0,
            "average": unique_bytes(list((self.ema or {}).values())),
            "pool": unique_bytes(list(state.pool.tensors().values())) if state.pool is not None else 0,
            "springs": unique_bytes(list(state.anchor.tensors())) if state.anchor is not None else 0,
            "adversary": unique_bytes(list(state.adversary.held())) if state.adversary is not None else 0,
            "gradients": self.engine.gradient_bytes,
        }
