"""The sections of a recipe: every key below another one, with its type, limits, default and one line of help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pecker_fast.recipe.errors import show
from pecker_fast.recipe.values import Count, Name, PathName, Positive, PromptsOrFile, Rate, Section, Weight, key


class LearningRates(Section):
    """Adam's step sizes."""

    generator: Rate = key(1.0e-4, "learning rate of the generator θ")
    score: Rate = key(1.0e-4, "learning rate of the score network ψ")
    warmup: Count = key(0, "iterations at the start of a stage over which both rates rise linearly; 0 = none")


MEANT_FOR = 1000  # steps of the schedule that the defaults of `timesteps` are positions on


class Timesteps(Section):
    """Positions on the teacher's own noise schedule; the defaults are those of 1000 steps, and of others keep their share."""

    init: Count = key(440, "timestep at which the one-step generator is run; defaults are for schedules of 1000 steps")
    min: Count = key(38, "lowest timestep drawn in training")
    max: Positive = key(712, "one above the highest timestep drawn in training")

    @model_validator(mode="after")
    def _ordered(self) -> Timesteps:
        if self.min >= self.max:
            raise ValueError(f"min ({self.min}) must be below max ({self.max})")
        return self


class Images(Section):
    """Samples that x_t is made of by noise, for methods that leave a model of many steps."""

    source: PathName = key(
        "pool",
        "pool = drawn once by the model itself, trajectory = half denoised by it in every iteration, or a folder of your own",
    )
    samples: Positive = key(256, "images of the pool for each branch")
    steps: Positive = key(20, "DDIM steps that draw them")
    guidance: float = key(1.0, "guidance they are drawn with", ge=0, le=100, allow_inf_nan=False)

    @property
    def is_folder(self) -> bool:
        return self.source not in ("pool", "trajectory")


class Objective(Section):
    """Coefficients that belong to one method."""

    eta: float = key(1.0, "η of esd, how far it steers away from the concept", gt=0, le=100, allow_inf_nan=False)
    ewc: float = key(10.0, "λ of sa, how hard the springs hold", ge=0, le=1e9, allow_inf_nan=False)
    ridge: float = key(0.5, "λ of uce, how hard the old matrix holds", gt=0, le=1e6, allow_inf_nan=False)
    crucial: bool = key(False, "spare: draw timesteps where concept and cover differ most, and not evenly")


def image_source(value: Any) -> Any:
    """One word sets the source."""
    return {"source": value} if isinstance(value, str) else value


class Guidance(Section):
    """Classifier-free guidance scales; 1 is no guidance."""

    score_train: float = key(1.0, "guidance of ψ in its own training", ge=0, le=100, allow_inf_nan=False)
    score: float = key(1.0, "guidance of ψ in the generator's loss", ge=0, le=100, allow_inf_nan=False)
    teacher: float = key(1.0, "guidance of the teacher φ", ge=0, le=100, allow_inf_nan=False)
    text_dropout: float = key(0.0, "share of conditions dropped while ψ trains", ge=0, lt=1, allow_inf_nan=False)
    unconditional: str | None = key(
        None, "text of the unconditional branch; null = empty, `keywords` = the keywords of forget", max_length=4096
    )


class Weights(Section):
    """Coefficients of the four loss terms."""

    score_retain: Weight = key(1.0, "s_r, score loss on retain classes")
    score_forget: Weight = key(1.0, "s_f, score loss on the forget classes")
    retain: Weight = key(1.0, "g_r, distillation loss on retain classes")
    forget: Weight = key(1.0, "g_f, forgetting loss on the forget classes")


class Mask(Section):
    """Which weights the forgetting gradient may move."""

    source: Literal["saliency", "random", "names", "none"] = key(
        "saliency", "how weights are chosen; names = all of the tensors in mask.only, none = all of them"
    )
    score: Literal["mse", "forget_loss"] = key("mse", "loss whose gradient is the saliency")
    contrast: bool = key(
        False, "divide by the same gradient on retain classes; with forget_loss needs a two-stage start"
    )
    density: float = key(0.5, "share of the weights that is kept", gt=0, le=1, allow_inf_nan=False)
    threshold: float | None = key(None, "fixed γ in place of a density; null = use density", gt=0, allow_inf_nan=False)
    structure: Literal["element", "row", "tile", "tensor"] = key("element", "unit that is kept or dropped as a whole")
    tile: list[Positive] = key([128, 128], "height and width of a tile", min_length=2, max_length=2)
    scope: Literal["global", "tensor"] = key("global", "one threshold for the model, or one for each tensor")
    reduction: Literal["sum", "abs", "square"] = key("sum", "how batches add up: |Σg|, Σ|g| or Σg²")
    samples: Positive = key(2048, "samples of the saliency pass, rounded to whole batches")
    data: PathName = key(
        "pseudo", "samples of the saliency pass: pseudo (of θ), teacher (multi-step), or an image folder"
    )
    timesteps: Literal["uniform", "train", "init"] = key("uniform", "timesteps of the saliency pass")
    skip: bool = key(True, "compute no weight gradients of dead rows and tiles where an update is masked")
    refresh: Count = key(0, "iterations between new masks; 0 = one mask, before the first step")
    only: list[Name] = key([], "tensors that alone may be in a mask, by name; [] = all")
    exclude: list[Name] = key([], "tensors that are in no mask, by name; * and ? stand for letters: class_embedding.*")


class Adversary(Section):
    """Conditions that are fitted, while θ forgets, to draw again what is forgotten; θ forgets under them too."""

    conditions: int = key(0, "conditions that attack; 0 = none", ge=0, le=4096)
    tokens: int = key(1, "soft tokens of each, in the place of the concept, where prompts are forgotten", ge=1, le=64)
    steps: int = key(1, "steps they take in an iteration", ge=1, le=1000)
    rate: float = key(0.1, "their step size (Adam)", gt=0, le=10, allow_inf_nan=False)
    restart: Count = key(15, "iterations after which one of them, in turn, starts afresh; 0 = never")
    share: float = key(0.5, "part of the forget branch that is drawn under them", gt=0, le=1, allow_inf_nan=False)
    half_way: float = key(
        0.0, "part of it that sets out from images noised to any timestep, and not from noise", ge=0, lt=1,
        allow_inf_nan=False,
    )  # fmt: skip
    starts: list[Literal["forget", "kept", "random"]] = key(
        ["forget", "kept"],
        "where they start, in turn: near what is forgotten, near what is kept, anywhere",
        min_length=1,
    )
    batch: Count = key(0, "samples of a step; 0 = batch_size")
    samples: Positive = key(
        512, "images of what is forgotten that they are fitted to, drawn before the first iteration"
    )


class Optimizer(Section):
    """Adam's settings, for both networks."""

    betas: list[Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]] = key(
        [0.0, 0.999], "decay of the first and second moment", min_length=2, max_length=2
    )
    eps: float = key(1.0e-8, "added to the root of the second moment", gt=0, le=1, allow_inf_nan=False)
    weight_decay: float = key(0.0, "L2 penalty", ge=0, le=1, allow_inf_nan=False)
    clip_value: float | None = key(1.0, "gradients are clipped to ± this value; null = off", gt=0, allow_inf_nan=False)


class Lora(Section):
    """The adapters that make ψ out of φ with `score: lora`, and θ out of its start with `student: lora`."""

    rank: int = key(16, "rank of the adapter in every layer", ge=1, le=4096)
    targets: Literal["all", "attention"] = key("all", "layers that get one: attention projections, or convolutions too")


class Engine(Section):
    """Where tensors live and how an iteration runs."""

    zero: int = key(0, "DeepSpeed ZeRO stage; 0 = one process without DeepSpeed", ge=0, le=3)
    offload: Literal["none", "cpu"] = key("none", "keep optimizer state in host memory")
    shard_teacher: bool = key(False, "spread the teacher's weights over the ranks too; needs zero=3")
    deepspeed: PathName | None = key(
        None, "DeepSpeed JSON with bucket sizes and logging of your own; the rest is the recipe's"
    )
    stall_s: float = key(600.0, "seconds without progress after which a run is ended", gt=0, allow_inf_nan=False)
    compile: Literal["none", "blocks"] = key(
        "none", "torch.compile on the repeated blocks of the networks, or not at all"
    )
    cuda_graph: bool = key(False, "run a whole iteration as one CUDA graph; needs a GPU")
    channels_last: bool = key(True, "feed the networks images in channels-last memory order")
    norms: Literal["plain", "fused"] = key(
        "plain", "GroupNorm and SiLU of the networks' blocks as two operations, or as one"
    )
    threads: int = key(0, "threads on the CPU; 0 = torch's choice", ge=0, le=4096)
    weights: Literal["fp32", "bf16"] = key("fp32", "number format the weights of φ, ψ and θ are kept in")
    checkpointing: bool = key(False, "keep no activations of blocks, compute them again on the way back")
    micro_batch: Count = key(0, "samples of each branch that pass the networks at once; 0 = the whole batch")


class Evaluate(Section):
    """When and how the model is judged."""

    every: Count = key(100, "iterations between evaluations in the loop; 0 = none")
    samples: Positive = key(512, "images of an evaluation in the loop")
    final: Count = key(2000, "images of the evaluation at the end; 0 = none")
    judge: PathName | None = key(None, "folder of the classifier that judges; null = the one beside the model")
    prompts: PromptsOrFile = key(
        None, "captions to judge a text-to-image model by, a file or a list; null = those of the training"
    )
    teacher_steps: Positive = key(50, "DDIM steps of the teacher's reference row")


class Audit(Section):
    """What the result has to stand at the end: attacks that try to bring back what was to be forgotten."""

    budget: Literal["none", "quick", "standard", "strong"] = key(
        "none", "how hard the audit at the end tries; none = no audit"
    )
    probes: list[Name] = key([], "its probes, as [condition, relearn]; [] = all", max_length=64)
    against: list[PathName] = key(
        [], "runs or models that never knew what is forgotten, to compare with", max_length=16
    )
    samples: Count = key(0, "images of each of its figures; 0 = the budget's")


class Checkpoint(Section):
    """When training state is saved."""

    every: Count = key(100, "iterations between checkpoints; 0 = only at the end")
    keep: Positive = key(2, "checkpoints kept")


def both_rates(value: Any) -> Any:
    """One number sets both rates; raises ValueError."""
    if isinstance(value, dict | LearningRates):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise ValueError(f"expected a number in (0, 1], or {{generator: …, score: …}}, got {show(value)}")
    return {"generator": value, "score": value}
