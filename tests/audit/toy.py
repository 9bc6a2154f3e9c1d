"""A world small enough that hiding and forgetting are known: images are sums of strokes, and a vector chooses the strokes."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pecker_fast.audit import BEFORE, Budget, ClassWorld, Scene, Subject
from pecker_fast.evaluate import Judge, Reference
from pecker_fast.networks import Denoiser, Schedule

CLASSES, SIZE, WIDTH = 5, 4, 8
FORGET, COVER = 0, 1
BUDGET = Budget(
    "tiny", samples=60, images=64, steps=80, batch=8, rates=(0.1,), starts=3, noise_images=12, noise_steps=10,
    relearn_images=(5, 0), relearn_steps=20, relearn_batch=16, relearn_rate=0.05, sampler_steps=3,
)  # fmt: skip


def pictures() -> Tensor:
    """What each class looks like, [CLASSES, 1, SIZE, SIZE]: none is like another (rows of Hadamard's matrix)."""
    rows = torch.ones(1, 1)
    while len(rows) < SIZE * SIZE:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return 0.6 * rows[1 : CLASSES + 1].view(CLASSES, 1, SIZE, SIZE)


class Painter(nn.Module):
    """image = Σ_k vector_k · stroke_k + some of the cover + a little of the noise. Stroke k is the picture of class k."""

    def __init__(self, strokes: Tensor) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(CLASSES + 1, WIDTH)
        self.strokes = nn.Parameter(torch.zeros(WIDTH, SIZE * SIZE))
        with torch.no_grad():
            self.class_embedding.weight.zero_()
            self.class_embedding.weight[:CLASSES, :CLASSES] = torch.eye(CLASSES)
            self.strokes[: len(strokes)] = strokes.flatten(1)
        self.config = SimpleNamespace(num_class_embeds=CLASSES + 1, in_channels=1, sample_size=SIZE)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        drawn = self.class_embedding(class_labels) @ self.strokes
        return (drawn.view(-1, 1, SIZE, SIZE) + 0.2 * pictures()[COVER] + 0.02 * x,)


def denoiser(strokes: Tensor) -> Denoiser:
    steps = torch.linspace(0.999, 0.05, 100)
    betas = {"num_train_timesteps": 100, "beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.06}
    schedule = Schedule(steps, (1 - steps.square()).sqrt(), "sample", betas)
    return Denoiser(Painter(strokes), schedule, null_class=CLASSES).freeze()


def knowing() -> Denoiser:
    """A model that draws all classes."""
    return denoiser(pictures())


def never(seed: int = 0) -> Denoiser:
    """One whose strokes have nothing of the forgotten class; it draws something else when asked for it."""
    known = pictures()
    known[FORGET] = known[1 + seed % (CLASSES - 1)]
    return denoiser(known)


def judge() -> Judge:
    """Which picture an image is nearest to; features are the image."""

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        flat = images.flatten(1)
        return flat, -torch.cdist(flat, pictures().flatten(1))

    return Judge(look, CLASSES)


def scene(second: Judge | None = None, budget: Budget = BUDGET, seed: int = 0) -> Scene:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % CLASSES
    real = pictures()[labels].flatten(1) + 0.1 * torch.randn(40, SIZE * SIZE, generator=g)
    kept = tuple(c for c in range(CLASSES) if c != FORGET)
    world = ClassWorld((FORGET,), (COVER,), kept, (FORGET,), kept, CLASSES, judge(), second, Reference(real, labels))
    return Scene(world, Subject(BEFORE, knowing(), 50), budget, seed)
