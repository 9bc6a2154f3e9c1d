"""What is compared: arms, the settings each may choose from, forget/cover pairs, seeds, and the budget of every stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

TILE = (16, 144)  # 16 output channels × 16 input channels of a 3×3 convolution: 128×128 holds half a tensor here
BATCH_SIZE = 48
MASK_SAMPLES = 2048
FEW_SAMPLES = 512  # the best mask again from a quarter of them: what does it cost to score?
UA_BAR = 0.99
PAIRS = ((0, 1), (3, 8), (7, 1))
SCORES = ("random", "mse", "mse+", "forget_loss", "forget_loss+")  # + = contrasted with the retain gradient
STRUCTURES = ("element", "row", "tile")
DENSITIES = (0.5, 0.1, 0.03)
RULES = ("differentiated", "salient_only", "alternating")


@dataclass(frozen=True)
class Arm:
    """One cell of the comparison. score "none": every weight is updated, as SFD does."""

    score: str
    structure: str = "element"
    density: float = 1.0
    rule: str = "dense"
    start: str = "two-stage"  # θ from the distilled generator, or from the teacher ("one-stage")
    samples: int = MASK_SAMPLES  # of each gradient that the mask is made from

    @property
    def name(self) -> str:
        """Short and a legal file name."""
        what = "none" if self.score == "none" else f"{self.score}-{self.structure}-{self.density:g}-{self.rule}"
        what += "" if self.samples == MASK_SAMPLES else f"-{self.samples}"
        return what if self.start == "two-stage" else f"{what}-one-stage"

    @property
    def label(self) -> str:
        """For tables and figures."""
        if self.score == "none":
            return "no mask"
        few = "" if self.samples == MASK_SAMPLES else f" · {self.samples} samples"
        return f"{self.score} · {self.structure} {self.density:g} · {self.rule.replace('_', ' ')}{few}"

    @property
    def loss(self) -> str:
        """`mask.score` of the recipe."""
        return self.score.removesuffix("+")

    @property
    def contrast(self) -> bool:
        return self.score.endswith("+")

    def twin(self) -> Arm:
        """The random mask of the same structure, density and rule."""
        return replace(self, score="random", samples=MASK_SAMPLES)


@dataclass(frozen=True)
class Config:
    """What is tuned for each arm: learning rates of θ and ψ, coefficient of the forgetting loss, warm-up in iterations."""

    lr: float
    lr_score: float
    forget: float
    warmup: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# The same list for every arm: the rate of θ doubles from line to line, the rest is spread over the lines.
CONFIGS = (
    Config(3.0e-5, 3e-3, 1.0, 0),
    Config(6.0e-5, 3e-3, 2.0, 20),
    Config(1.2e-4, 1e-3, 1.0, 0),
    Config(2.5e-4, 3e-3, 0.5, 20),
    Config(5.0e-4, 1e-3, 1.0, 20),
    Config(1.0e-3, 3e-3, 1.0, 0),
)
RUNGS = ((25, 6), (60, 3), (120, 1))  # (iterations, configs alive until then): each rung judges, the best go on
REFINE_STEPS = 100
FINAL_STEPS = 200
ONE_STAGE_CONFIGS = (Config(1e-4, 1e-3, 1.0, 0), Config(2e-4, 3e-3, 1.0, 20), Config(6e-4, 3e-3, 1.0, 20))
ONE_STAGE_RUNGS = ((100, 3), (200, 1))
ONE_STAGE_STEPS = 300
SEEDS = {PAIRS[0]: (0, 1, 2, 3, 4), PAIRS[1]: (0, 1), PAIRS[2]: (0, 1)}  # of the finals
ONE_STAGE_SEEDS = {PAIRS[0]: (0, 1)}
RELEARN_STEPS = 100
RELEARN_SEEDS = 3  # of the first pair
TUNING_SEED = 100  # apart from the seeds of the finals
JUDGE_EVERY = 10

NONE = Arm("none")
PAPER = Arm("mse", "element", 0.5, "differentiated")


def screened() -> list[Arm]:
    """The arms of the screening. The others of the full grid are listed by `skipped`."""
    arms = [NONE, PAPER]
    arms += [Arm(s, "element", 0.5, "differentiated") for s in SCORES]
    arms += [Arm(s, "row", 0.1, "salient_only") for s in SCORES]
    ends = ("random", "forget_loss+")  # the control, and the best of the first looks
    arms += [Arm(s, "row", 0.1, r) for r, s in product(("differentiated", "alternating"), ends)]
    arms += [Arm(s, "element", 0.5, r) for r, s in product(("salient_only", "alternating"), ("random", "mse"))]
    arms += [Arm(s, "element", 0.1, "salient_only") for s in ("random", "mse", "forget_loss+")]
    arms += [Arm(s, "element", 0.1, "differentiated") for s in ("random", "mse")]
    arms += [Arm(s, "row", d, "salient_only") for d, s in product((0.5, 0.03), ends)]
    arms += [Arm(s, "tile", d, "salient_only") for d, s in product(DENSITIES, ends)]
    arms += [Arm(s, "element", 0.03, "salient_only") for s in ends]
    return list(dict.fromkeys(arms))


def skipped() -> list[Arm]:
    """Cells of the full grid that are not screened: the budget does not reach further."""
    grid = [Arm(*cell) for cell in product(SCORES, STRUCTURES, DENSITIES, RULES)]
    chosen = set(screened())
    return [arm for arm in grid if arm not in chosen]


def neighbours(best: Config) -> list[Config]:
    """The settings tried around an arm's best: θ's rate half a step down and up, ψ's other rate, another coefficient."""
    other = 1e-3 if best.lr_score > 1e-3 else 3e-3
    return [
        replace(best, lr=best.lr / 1.5),
        replace(best, lr=best.lr * 1.5),
        replace(best, lr_score=other),
        replace(best, forget=best.forget * 2 if best.forget < 2 else best.forget / 2, warmup=20 - best.warmup),
    ]
