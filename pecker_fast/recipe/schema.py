"""The recipe: every setting of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from pecker_fast.recipe.classes import check_classes, class_list
from pecker_fast.recipe.errors import closest, show
from pecker_fast.recipe.methods import MethodKeys, methods
from pecker_fast.recipe.sections import (
    Adversary,
    Audit,
    Checkpoint,
    Engine,
    Evaluate,
    Guidance,
    Images,
    LearningRates,
    Lora,
    Mask,
    Objective,
    Optimizer,
    Timesteps,
    Weights,
    both_rates,
    image_source,
)
from pecker_fast.recipe.values import Conditions, ConditionsOrNull, Count, Covers, Name, PathName, Section, key, section


def _known_method(value: str) -> str:
    names = list(methods())
    if value not in names:
        close = closest(value, names)
        raise ValueError(
            f"expected one of {', '.join(names)}, got {show(value)}" + (f"; did you mean {close}?" if close else "")
        )
    return value


Method = Annotated[Name, AfterValidator(_known_method)]


class Recipe(Section):
    """All settings of a run. Attribute names are the recipe's keys, except `config_folder` for `model_config`."""

    model: PathName = key(
        "digits", "shipped name, diffusers folder, single file or hub name (owner/name) of the teacher"
    )
    revision: Name | None = key(None, "commit or tag of a hub model; null = its newest, pinned in the run's recipe")
    config_folder: PathName | None = key(
        None, "folder with configs and tokenizer, for single files", alias="model_config"
    )
    method: Method = key("pecker", "how the model forgets; `pecker-fast recipes methods` lists them")
    forget: Conditions = key(0, "class to forget, or a list; or prompts, a prompt file, or {concept: …, prompts: …}")
    cover: Covers = key(1, "class, or text, that takes its place; or one for each")
    retain: ConditionsOrNull = key(None, "classes to keep (null = every other one), or captions: a file or a list")
    null_class: Count | None = key(
        None, "index of the label-dropout embedding; null = as the model's model.json or its judge has it"
    )
    steps: Count = key(500, "iterations (score step + generator step) of forgetting")
    distill_steps: Count = key(0, "iterations of plain distillation before forgetting (two-stage)")
    generator: PathName | None = key(None, "distilled generator to start θ (and ψ) from; null = from the teacher")
    batch_size: int = key(64, "samples of each branch per iteration, over all ranks", ge=1, le=1_000_000)
    lr: Annotated[LearningRates, BeforeValidator(both_rates)] = section(
        LearningRates, "learning rates; one number sets both"
    )
    alpha: float = key(1.2, "α of the distillation losses", ge=0, le=100, allow_inf_nan=False)
    timesteps: Timesteps = section(Timesteps, "positions on the noise schedule")
    images: Annotated[Images, BeforeValidator(image_source)] = section(
        Images, "what methods that leave a model of many steps learn from; one word sets the source"
    )
    objective: Objective = section(Objective, "coefficients that belong to one method")
    guidance: Guidance = section(Guidance, "classifier-free guidance scales")
    detach_score: bool = key(False, "no gradient through φ and ψ (Diff-Instruct variant)")
    weights: Weights = section(Weights, "coefficients of the four loss terms")
    mask: Mask = section(Mask, "which weights the forgetting gradient may move")
    adversary: Adversary = section(
        Adversary, "conditions that try to draw what is forgotten, while it is being forgotten"
    )
    update_rule: Literal["differentiated", "salient_only", "alternating"] = key(
        "differentiated", "one step on g_r + m⊙g_f, or salient weights only, or two steps in turn"
    )
    optimizer: Optimizer = section(Optimizer, "Adam's settings")
    ema: float = key(0.98, "decay of the exported average of θ, with warm-up; 0 = off", ge=0, lt=1, allow_inf_nan=False)
    precision: Literal["fp32", "bf16"] = key("fp32", "number format the networks compute in")
    resolution: int | None = key(None, "pixels a side of a text-to-image model's images; null = its own", ge=8, le=8192)
    score: Literal["full", "lora"] = key("full", "how ψ is trained: all its weights, or φ with an adapter")
    student: Literal["full", "lora"] = key("full", "how θ is trained: all its weights, or adapters on where it starts")
    lora: Lora = section(Lora, "adapters, of `score: lora` and `student: lora`")
    engine: Engine = section(Engine, "where tensors live")
    evaluate: Evaluate = section(Evaluate, "when and how the model is judged")
    audit: Audit = section(Audit, "what the result has to stand at the end")
    checkpoint: Checkpoint = section(Checkpoint, "when training state is saved")
    seed: int = key(0, "seed of every random draw", ge=0, lt=2**63)
    output: PathName = key("runs/digits", "run folder")
    resume: PathName = key("auto", "auto = go on where the run folder stopped, never, or a checkpoint folder")

    @property
    def facts(self) -> MethodKeys:
        """What is known of the method."""
        return methods()[self.method]

    @property
    def one_step(self) -> bool:
        """`MethodKeys.one_step`."""
        return self.facts.one_step

    @property
    def uses_mask(self) -> bool:
        """Whether there is a mask at all: never for a method without, nor for `mask.source: none`."""
        return self.facts.masked and self.mask.source != "none"

    @property
    def uses_adversary(self) -> bool:
        """Whether θ forgets under conditions that attack it."""
        return self.adversary.conditions > 0 and self.steps > 0

    @property
    def uses_prompts(self) -> bool:
        """Whether conditions are prompts (a text-to-image model) and not class numbers."""
        return is_text(self.forget)

    def _same_kind(self) -> None:
        kinds = {True: "prompts", False: "classes"}
        for name in ("cover", "retain"):
            value = getattr(self, name)
            if value is not None and is_text(value) != self.uses_prompts:
                raise ValueError(f"{name}: names {kinds[is_text(value)]} where forget names {kinds[self.uses_prompts]}")
        if self.cover is None and not self.uses_prompts:
            raise ValueError("cover: a class is needed that takes the place of the forgotten one")

    def _classes_fit(self) -> None:
        listed: list[Any] = [v if isinstance(v, list) else [v] for v in (self.forget, self.cover, self.retain)]
        check_classes(*listed)

    def _adversary_fits(self) -> None:
        count, forgotten = self.adversary.conditions, 1 if self.uses_prompts else len(class_list(self.forget))
        if not self.weights.forget:
            raise ValueError(
                "adversary.conditions: with weights.forget=0 there is no forget branch to be drawn under them"
            )
        if count < forgotten:
            raise ValueError(
                f"adversary.conditions: {count} cannot attack {forgotten} classes; give one for each, or more"
            )
        if self.adversary.share + self.adversary.half_way > 1:
            raise ValueError(
                f"adversary.half_way: {self.adversary.half_way:g} and adversary.share={self.adversary.share:g} are more than all "
                "of the forget branch; lower one"
            )
        if self.engine.cuda_graph:
            raise ValueError("adversary.conditions: is not supported with engine.cuda_graph; leave one of the two out")

    def _many_steps_fit(self) -> None:
        """What belongs to one-step generators alone."""
        name, kind = self.method, self.facts.kind
        there = {
            "distill_steps": self.distill_steps > 0,
            "generator": self.generator is not None,
            "score": self.score != "full",
            "detach_score": self.detach_score,
            "adversary.half_way": self.adversary.half_way > 0,
            "engine.cuda_graph": self.engine.cuda_graph,
        }
        if kind == "edit":
            there |= {"adversary.conditions": self.adversary.conditions > 0}
            there |= {"steps": self.steps > 0, "engine.zero": self.engine.zero > 0, "ema": self.ema > 0}
        for one, given in there.items():
            if given:
                what = "is in closed form" if kind == "edit" else "makes a model of many steps"
                raise ValueError(f"{one}: method {name} {what} and has no use for it; leave it out")

    def _student_fits(self) -> None:
        """What goes with adapters as θ."""
        if self.facts.kind == "edit":
            raise ValueError(f"student: method {self.method} changes weights in closed form; leave it out")
        if self.distill_steps:
            raise ValueError(
                "student: adapters stand on a distilled generator; `pecker-fast distil` makes one for generator="
            )
        if self.engine.zero:
            raise ValueError(
                "engine.zero: adapters are few and are not spread over ranks; leave it out, or use student=full"
            )
        if self.uses_mask and self.mask.refresh:
            raise ValueError(
                "mask.refresh: adapters stand where the first mask says; leave it out, or use student=full"
            )
        if self.uses_mask and self.update_rule != "salient_only":
            raise ValueError(
                f"update_rule: the mask of a LoRA student is in its product, for every branch; {self.update_rule} moves more: use "
                "salient_only, or student=full"
            )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._same_kind()
        if not self.uses_prompts:
            self._classes_fit()
        if self.mask.threshold is not None and self.mask.scope == "tensor":
            raise ValueError(
                "mask.scope: tensor is a density for each tensor; mask.threshold goes with mask.scope=global"
            )
        if self.engine.compile != "none" and self.mask.refresh and self.mask.skip and self.uses_mask:
            raise ValueError("mask.refresh: with engine.compile every new mask is compiled anew; add mask.skip=false")
        if self.engine.compile != "none" and "lora" in (self.score, self.student):
            raise ValueError(
                "engine.compile: adapters change their layers between passes; use score=full and student=full, or no compile"
            )
        if self.student == "lora":
            self._student_fits()
        if self.engine.weights == "bf16" and self.precision != "bf16":
            raise ValueError("engine.weights: bf16 weights need precision=bf16")
        w = self.weights
        if self.mask.source == "names" and not self.mask.only:
            raise ValueError('mask.only: mask.source=names needs tensors by name, such as ["*attn2*"]')
        if not self.one_step:
            self._many_steps_fit()
        if self.uses_adversary:
            self._adversary_fits()
        if self.one_step and self.steps and not (w.score_retain or w.score_forget):
            raise ValueError("weights.score_retain: both score weights are 0, so ψ would learn nothing; raise one")
        if self.steps and not (w.retain or w.forget):
            raise ValueError("weights.retain: both generator weights are 0, so θ would learn nothing; raise one")
        if self.distill_steps and not (w.retain and w.score_retain):
            raise ValueError("weights.retain: distillation needs weights.retain and weights.score_retain above 0")
        return self


def is_text(value: Any) -> bool:
    """Whether a `forget` value means prompts (text, a mapping, a list holding one) rather than class numbers."""
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, str | Mapping) for item in items)
