"""The recipe: every setting of a run, with its type, limits, default and one line of help."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pecker_fast import files
from pecker_fast.errors import RecipeError
from pecker_fast.recipe.errors import closest, explain, fields_of, section_type, show
from pecker_fast.recipe.yaml import parse_yaml

RECIPES = Path(__file__).parent / "shipped"
MAX_RECIPE_BYTES = 1 << 20
MANY = 10**9  # a limit for counts, far above any use, far below what overflows


def _key(default: Any, help: str, **limits: Any) -> Any:
    return Field(default=default, description=help, **limits)


def _section(kind: type[BaseModel], help: str) -> Any:
    return Field(default_factory=kind, description=help)


def _covers(value: Any) -> Any:
    """A class number, or one for each forget class (the same may serve several); raises ValueError."""
    return _classes(value, distinct=False)


def _classes(value: Any, distinct: bool = True) -> Any:
    """A class number, a list of them, or prompts in one of their forms; raises ValueError."""
    if isinstance(value, str | dict):
        return value
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("the list is empty; name at least one class, or one prompt")
    if all(isinstance(item, str) for item in items) or all(isinstance(item, dict) for item in items):
        return value
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise ValueError(f"expected a class number or a list of them, got {show(item)}")
        if not 0 <= item <= MANY:
            raise ValueError(f"a class number is 0 or more, got {item}")
    if distinct and len(set(items)) < len(items):
        raise ValueError(f"a class is named twice in {items}")
    return value


def _classes_or_null(value: Any) -> Any:
    return None if value is None else _classes(value)


def _covers_or_null(value: Any) -> Any:
    return None if value is None else _covers(value)


def _both_rates(value: Any) -> Any:
    """One number sets both rates; raises ValueError."""
    if isinstance(value, dict | LearningRates):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise ValueError(f"expected a number in (0, 1], or {{generator: …, score: …}}, got {show(value)}")
    return {"generator": value, "score": value}


Covers = Annotated[int | list[int] | str | list[str] | dict[str, Any] | None, BeforeValidator(_covers_or_null)]
Conditions = Annotated[
    int | list[int] | str | list[str] | dict[str, Any] | list[dict[str, Any]], BeforeValidator(_classes)
]
ConditionsOrNull = Annotated[
    int | list[int] | str | list[str] | dict[str, Any] | None, BeforeValidator(_classes_or_null)
]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=MANY)]
Positive = Annotated[int, Field(ge=1, le=MANY)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]


class Section(BaseModel):
    """Strict and immutable: unknown keys, a text for a number and a truth value for a number are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class LearningRates(Section):
    """Adam's step sizes."""

    generator: Rate = _key(1.0e-4, "learning rate of the generator θ")
    score: Rate = _key(1.0e-4, "learning rate of the score network ψ")
    warmup: Count = _key(0, "iterations at the start of a stage over which both rates rise linearly; 0 = none")


class Timesteps(Section):
    """Positions on the teacher's noise schedule of 1000 steps."""

    init: int = _key(440, "timestep at which the one-step generator is run", ge=0, lt=1000)
    min: int = _key(38, "lowest timestep drawn in training", ge=0, lt=1000)
    max: int = _key(712, "one above the highest timestep drawn in training", ge=1, le=1000)

    @model_validator(mode="after")
    def _ordered(self) -> Timesteps:
        if self.min >= self.max:
            raise ValueError(f"min ({self.min}) must be below max ({self.max})")
        return self


class Guidance(Section):
    """Classifier-free guidance scales; 1 is no guidance."""

    score_train: float = _key(1.0, "guidance of ψ in its own training", ge=0, le=100, allow_inf_nan=False)
    score: float = _key(1.0, "guidance of ψ in the generator's loss", ge=0, le=100, allow_inf_nan=False)
    teacher: float = _key(1.0, "guidance of the teacher φ", ge=0, le=100, allow_inf_nan=False)
    text_dropout: float = _key(0.0, "share of conditions dropped while ψ trains", ge=0, lt=1, allow_inf_nan=False)
    unconditional: str | None = _key(
        None, "text of the unconditional branch; null = empty, `keywords` = the keywords of forget", max_length=4096
    )


class Weights(Section):
    """Coefficients of the four loss terms."""

    score_retain: Weight = _key(1.0, "s_r, score loss on retain classes")
    score_forget: Weight = _key(1.0, "s_f, score loss on the forget classes")
    retain: Weight = _key(1.0, "g_r, distillation loss on retain classes")
    forget: Weight = _key(1.0, "g_f, forgetting loss on the forget classes")


class Mask(Section):
    """Which weights the forgetting gradient may move."""

    source: Literal["saliency", "random", "none"] = _key("saliency", "how weights are chosen; none = all of them")
    score: Literal["mse", "forget_loss"] = _key("mse", "loss whose gradient is the saliency")
    contrast: bool = _key(False, "divide by the same gradient on retain classes")
    density: float = _key(0.5, "share of the weights that is kept", gt=0, le=1, allow_inf_nan=False)
    threshold: float | None = _key(None, "fixed γ in place of a density; null = use density", gt=0, allow_inf_nan=False)
    structure: Literal["element", "row", "tile", "tensor"] = _key("element", "unit that is kept or dropped as a whole")
    tile: list[Positive] = _key([128, 128], "height and width of a tile", min_length=2, max_length=2)
    scope: Literal["global", "tensor"] = _key("global", "one threshold for the model, or one for each tensor")
    reduction: Literal["sum", "abs", "square"] = _key("sum", "how batches add up: |Σg|, Σ|g| or Σg²")
    samples: Positive = _key(2048, "samples of the saliency pass, rounded to whole batches")
    data: Name = _key("pseudo", "samples of the saliency pass: pseudo (of θ), teacher (multi-step), or an image folder")
    timesteps: Literal["uniform", "train", "init"] = _key("uniform", "timesteps of the saliency pass")
    skip: bool = _key(True, "compute no weight gradients of dead rows and tiles where an update is masked")
    refresh: Count = _key(0, "iterations between new masks; 0 = one mask, before the first step")


class Optimizer(Section):
    """Adam's settings, for both networks."""

    betas: list[Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]] = _key(
        [0.0, 0.999], "decay of the first and second moment", min_length=2, max_length=2
    )
    eps: float = _key(1.0e-8, "added to the root of the second moment", gt=0, le=1, allow_inf_nan=False)
    weight_decay: float = _key(0.0, "L2 penalty", ge=0, le=1, allow_inf_nan=False)
    clip_value: float | None = _key(1.0, "gradients are clipped to ± this value; null = off", gt=0, allow_inf_nan=False)


class Lora(Section):
    """The adapter that makes ψ out of φ with `score: lora`."""

    rank: int = _key(16, "rank of the adapter in every layer", ge=1, le=4096)
    targets: Literal["all", "attention"] = _key(
        "all", "layers that get one: attention projections, or convolutions too"
    )


class Engine(Section):
    """Where tensors live and how an iteration runs."""

    zero: int = _key(0, "DeepSpeed ZeRO stage; 0 = one process without DeepSpeed", ge=0, le=3)
    offload: Literal["none", "cpu"] = _key("none", "keep optimizer state in host memory")
    shard_teacher: bool = _key(False, "spread the teacher's weights over the ranks too; needs zero=3")
    deepspeed: Name | None = _key(
        None, "DeepSpeed JSON with bucket sizes and logging of your own; the rest is the recipe's"
    )
    stall_s: float = _key(600.0, "seconds without progress after which a run is ended", gt=0, allow_inf_nan=False)
    compile: Literal["none", "blocks"] = _key(
        "none", "torch.compile on the repeated blocks of the networks, or not at all"
    )
    cuda_graph: bool = _key(False, "run a whole iteration as one CUDA graph; needs a GPU")
    channels_last: bool = _key(True, "feed the networks images in channels-last memory order")
    threads: int = _key(0, "threads on the CPU; 0 = torch's choice", ge=0, le=4096)
    weights: Literal["fp32", "bf16"] = _key("fp32", "number format the weights of φ, ψ and θ are kept in")
    checkpointing: bool = _key(False, "keep no activations of blocks, compute them again on the way back")
    micro_batch: Count = _key(0, "samples of each branch that pass the networks at once; 0 = the whole batch")


class Evaluate(Section):
    """When and how the model is judged."""

    every: Count = _key(100, "iterations between evaluations in the loop; 0 = none")
    samples: Positive = _key(512, "images of an evaluation in the loop")
    final: Count = _key(2000, "images of the evaluation at the end; 0 = none")
    judge: Name | None = _key(None, "folder of the classifier that judges; null = the one beside the model")
    prompts: str | list[str] | None = _key(
        None, "captions to judge a text-to-image model by, a file or a list; null = those of the training"
    )
    teacher_steps: int = _key(50, "DDIM steps of the teacher's reference row", ge=1, le=1000)


class Checkpoint(Section):
    """When training state is saved."""

    every: Count = _key(100, "iterations between checkpoints; 0 = only at the end")
    keep: Positive = _key(2, "checkpoints kept")


class Recipe(Section):
    """All settings of a run. Attribute names are the recipe's keys, except `config_folder` for `model_config`."""

    model: Name = _key("digits", "shipped name, diffusers folder, single file or hub name (owner/name) of the teacher")
    revision: Name | None = _key(None, "commit or tag of a hub model; null = its newest, pinned in the run's recipe")
    config_folder: Name | None = _key(None, "folder with configs and tokenizer, for single files", alias="model_config")
    method: Literal["pecker", "sfd"] = _key(
        "pecker", "pecker = saliency-masked SFD, sfd = score forgetting distillation"
    )
    forget: Conditions = _key(0, "class to forget, or a list; or prompts, a prompt file, or {concept: …, prompts: …}")
    cover: Covers = _key(1, "class, or text, that takes its place; or one for each")
    retain: ConditionsOrNull = _key(None, "classes to keep (null = every other one), or captions: a file or a list")
    steps: Count = _key(500, "iterations (score step + generator step) of forgetting")
    distill_steps: Count = _key(0, "iterations of plain distillation before forgetting (two-stage)")
    generator: Name | None = _key(None, "distilled generator to start θ (and ψ) from; null = from the teacher")
    batch_size: int = _key(64, "samples of each branch per iteration, over all ranks", ge=1, le=1_000_000)
    lr: Annotated[LearningRates, BeforeValidator(_both_rates)] = _section(
        LearningRates, "learning rates; one number sets both"
    )
    alpha: float = _key(1.2, "α of the distillation losses", ge=0, le=100, allow_inf_nan=False)
    timesteps: Timesteps = _section(Timesteps, "positions on the noise schedule")
    guidance: Guidance = _section(Guidance, "classifier-free guidance scales")
    detach_score: bool = _key(False, "no gradient through φ and ψ (Diff-Instruct variant)")
    weights: Weights = _section(Weights, "coefficients of the four loss terms")
    mask: Mask = _section(Mask, "which weights the forgetting gradient may move")
    update_rule: Literal["differentiated", "salient_only", "alternating"] = _key(
        "differentiated", "one step on g_r + m⊙g_f, or salient weights only, or two steps in turn"
    )
    optimizer: Optimizer = _section(Optimizer, "Adam's settings")
    ema: float = _key(
        0.98, "decay of the exported average of θ, with warm-up; 0 = off", ge=0, lt=1, allow_inf_nan=False
    )
    precision: Literal["fp32", "bf16"] = _key("fp32", "number format the networks compute in")
    resolution: int | None = _key(
        None, "pixels a side of a text-to-image model's images; null = its own", ge=8, le=8192
    )
    score: Literal["full", "lora"] = _key("full", "how ψ is trained: all its weights, or φ with an adapter")
    lora: Lora = _section(Lora, "the adapter of `score: lora`")
    engine: Engine = _section(Engine, "where tensors live")
    evaluate: Evaluate = _section(Evaluate, "when and how the model is judged")
    checkpoint: Checkpoint = _section(Checkpoint, "when training state is saved")
    seed: int = _key(0, "seed of every random draw", ge=0, lt=2**63)
    output: Name = _key("runs/digits", "run folder")
    resume: Name = _key("auto", "auto = go on where the run folder stopped, never, or a checkpoint folder")

    @property
    def uses_mask(self) -> bool:
        """Whether a mask is computed at all: never for sfd, nor for `mask.source: none`."""
        return self.method != "sfd" and self.mask.source != "none"

    @property
    def uses_prompts(self) -> bool:
        """Whether conditions are prompts (a text-to-image model) and not class numbers."""
        return is_text(self.forget)

    def _same_kind(self) -> None:
        kinds = {True: "prompts", False: "classes"}
        for key in ("cover", "retain"):
            value = getattr(self, key)
            if value is not None and is_text(value) != self.uses_prompts:
                raise ValueError(f"{key}: names {kinds[is_text(value)]} where forget names {kinds[self.uses_prompts]}")
        if self.cover is None and not self.uses_prompts:
            raise ValueError("cover: a class is needed that takes the place of the forgotten one")

    def _classes_fit(self) -> None:
        forget, cover, retain = (
            value if isinstance(value, list) else [value] for value in (self.forget, self.cover, self.retain)
        )
        if shared := [c for c in cover if c in forget]:
            raise ValueError(f"cover: class {shared[0]} is to be forgotten itself; choose a class outside forget")
        if shared := [c for c in retain if c in forget]:
            raise ValueError(f"retain: class {shared[0]} is to be forgotten; take it out of retain or out of forget")
        if len(cover) not in (1, len(forget)):
            raise ValueError(f"cover: {len(cover)} classes for {len(forget)} forget classes; give one, or one for each")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._same_kind()
        if not self.uses_prompts:
            self._classes_fit()
        if self.engine.compile != "none" and self.mask.refresh and self.mask.skip and self.uses_mask:
            raise ValueError("mask.refresh: with engine.compile every new mask is compiled anew; add mask.skip=false")
        if self.engine.compile != "none" and self.score == "lora":
            raise ValueError(
                "engine.compile: adapters change their layers between passes; use score=full, or no compile"
            )
        if self.engine.weights == "bf16" and self.precision != "bf16":
            raise ValueError("engine.weights: bf16 weights need precision=bf16")
        w = self.weights
        if self.steps and not (w.score_retain or w.score_forget):
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


def shipped_recipes() -> dict[str, Path]:
    """Recipes inside the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(source: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file (None: the defaults), with `key.sub=value` overrides applied.

    Raises RecipeError, one line that names the dotted key and the remedy.
    """
    data: Any = {}
    where = "recipe"
    if source is not None:
        path = shipped_recipes().get(str(source)) if isinstance(source, str) else None
        path = path or Path(source)
        where = f"recipe {path}" if path.parent != RECIPES else f"recipe {path.name}"
        data = _read(path, source, where)
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise RecipeError(f"override {override[:80]!r}: expected key=value, such as mask.density=0.1")
        given[key] = parse_yaml(text, f"override {key}")
        _apply(data, key, given[key])
    if data.get("method") == "sfd":
        for key, value in given.items():
            if key.split(".")[0] == "mask" and (key, value) != ("mask.source", "none"):
                raise RecipeError(f"override {key}: method sfd has no mask; use method=pecker, or leave {key} out")
    return recipe_from(data, where, overridden=given)


def _read(path: Path, source: str | Path, where: str) -> dict[str, Any]:
    if not os.path.exists(path):  # unlike Path.exists, false for a name too long to be one
        names = list(shipped_recipes())
        close = closest(path.stem, names)
        hint = f", did you mean {close}?" if close else ""
        raise RecipeError(
            f"recipe {str(source)[:200]}: no such recipe or file{hint} (shipped recipes: {', '.join(names)})"
        )
    text = files.read_text(path, limit=MAX_RECIPE_BYTES, error=RecipeError)
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        found = "it is empty" if data is None else f"it holds a {type(data).__name__}"
        raise RecipeError(
            f"{where}: expected `key: value` lines, but {found}; `pecker-fast recipes show digits` is one"
        )
    return data


def _apply(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a mapping is merged into a section."""
    *parents, last = key.split(".")
    for name in parents:
        inside = data.get(name)
        if name == "lr" and isinstance(inside, int | float):
            inside = {"generator": inside, "score": inside}
        if inside is not None and not isinstance(inside, dict):
            raise RecipeError(f"override {key}: {name} is {show(inside)} in the recipe, not a section")
        data[name] = data = inside or {}
    old = data.get(last)
    section = section_type(fields_of(Recipe).get(key))
    data[last] = {**old, **value} if section and isinstance(old, dict) and isinstance(value, dict) else value


def recipe_from(data: Mapping[str, Any], where: str = "recipe", overridden: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a mapping as it stands in YAML; raises RecipeError starting with `where`."""
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, where, overridden or {})) from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values, keys as in YAML and in their documented order."""
    return recipe.model_dump(by_alias=True)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(
        recipe_to_dict(recipe), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True
    )


def idle_keys(recipe: Recipe) -> list[str]:
    """Keys set to something else than their default that do nothing in this recipe, one line each with the reason."""
    random = ("score", "contrast", "reduction", "samples", "data", "timesteps", "threshold")
    rules: list[tuple[bool, str, tuple[str, ...]]] = [
        (recipe.method == "sfd", "method=sfd", ("mask.source", "mask.density", "mask.structure", "update_rule")),
        (recipe.method != "sfd" and recipe.mask.source == "none", "mask.source=none", ("mask.density", "update_rule")),
        (recipe.mask.source == "random", "mask.source=random", tuple(f"mask.{key}" for key in random)),
        (recipe.mask.source != "random" and recipe.mask.threshold is not None, "mask.threshold", ("mask.density",)),
        (recipe.mask.score == "forget_loss", "mask.score=forget_loss", ("mask.data", "mask.timesteps")),
        (recipe.mask.structure != "tile", f"mask.structure={recipe.mask.structure}", ("mask.tile",)),
        (
            recipe.engine.zero == 0,
            "engine.zero=0",
            tuple(f"engine.{k}" for k in ("stall_s", "offload", "deepspeed", "shard_teacher")),
        ),
        (recipe.score == "full", "score=full", ("lora.rank", "lora.targets")),
        (not recipe.uses_prompts, "classes to forget", ("resolution", "guidance.unconditional", "evaluate.prompts")),
    ]
    values, defaults = _flat(recipe), _flat(Recipe())
    return [
        f"{key} has no effect with {cause}"
        for applies, cause, keys in rules
        if applies
        for key in keys
        if values[key] != defaults[key]
    ]


def _flat(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe_to_dict(recipe).items():
        flat |= {f"{key}.{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def recipe_help() -> list[tuple[str, str, Any, str]]:
    """(dotted key, type, default, help) of every key that holds a value, in the documented order."""
    rows = []
    for key, field in fields_of(Recipe).items():
        if section_type(field) is None:
            rows.append((key, _type_text(field.annotation), field.default, field.description or ""))
    return rows


def _type_text(kind: Any) -> str:
    words = {int: "integer", float: "number", bool: "true | false", str: "text", type(None): "null", dict: "mapping"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is list:
        return f"list of {_type_text(inner[0])}"
    if origin is Annotated:
        return _type_text(inner[0])
    if inner and origin is not dict:
        return " | ".join(_type_text(one) for one in inner)
    return words.get(origin or kind, str(kind))
