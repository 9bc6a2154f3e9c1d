"""Conditions that attack θ while it forgets: vectors fitted to draw again what is forgotten, and a forget branch under them.

All draws are functions of seed and step. Their streams are "adversary-…": an audit has others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.inversion import Vectors, denoising_error, drawing_error, near, turns
from pecker_fast.forgetting.losses import generate
from pecker_fast.forgetting.samplers import denoised
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe

NEAR = 0.3  # noise of a start near a condition, as a share of its size
EARLIEST = 0.2  # of the schedule: with less noise an image leaves nothing to decide
EMPTY = 0.3  # of the samples that begin half-way from what shows the concept: under no condition

OwnVectors = Callable[
    [Tensor], Tensor
]  # conditions [N] -> what stands in a free vector's place, see Denoiser.own_vectors


@dataclass
class Adversary:
    """K vectors with what they are fitted to. Images, and not the network that drew them, so that no copy of it is kept."""

    vectors: Vectors
    images: Tensor  # [P, C, H, W] float32, what θ drew of `z` under `c` before it was to forget
    c: Tensor  # [P], forgotten conditions
    covers: (
        Tensor  # [P or 0, C, H, W] float32, what it drew of `z` under the covers, where the branch starts half-way too
    )
    seed: int  # of the recipe

    @cached_property
    def z(self) -> Tensor:
        """[P, C, H, W], the noise the images were drawn of: a function of the seed, so it is never stored."""
        return pool_noise(self.seed, self.images.shape).to(self.images.device)

    @property
    def count(self) -> int:
        return len(self.vectors.values)

    def held(self) -> list[Tensor]:
        """What lies in memory."""
        return [*self.tensors().values(), self.z]

    def tensors(self) -> dict[str, Tensor]:
        """What must survive an interruption, by name."""
        return {**self.vectors.tensors(), "images": self.images, "c": self.c, "covers": self.covers}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], seed: int) -> "Adversary":
        """Inverse of `tensors`. Raises KeyError."""
        state = Vectors(*(tensors[name].clone() for name in ("values", "first", "second", "steps")))
        images = tensors["images"]
        return cls(state, images, tensors["c"], tensors.get("covers", images[:0]), seed)


@dataclass(frozen=True)
class Attack:
    """What one step of all vectors is taken on, m samples."""

    z: Tensor  # [m, C, H, W], what a one-step generator draws the target of; the noise in it where θ is a model of many steps
    target: Tensor  # [m, C, H, W]
    codes: Tensor  # [m], conditions of θ
    t: Tensor  # [m], where θ starts, or is asked for the noise

    def tensors(self) -> list[Tensor]:
        return [self.z, self.target, self.codes, self.t]

    def part(self, samples: slice) -> "Attack":
        return Attack(*(tensor[samples] for tensor in self.tensors()))

    def error(self, theta: Denoiser, one_step: bool) -> Tensor:
        """How far θ is from drawing the target under the vectors, [m]."""
        if one_step:
            return drawing_error(theta, self.z, self.codes, self.target, self.t)
        return denoising_error(theta, self.target, self.z, self.t, self.codes)


def pool_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Drawn on the CPU, so equal on every device."""
    return torch.randn(*shape, generator=draws.generator(seed, "adversary-pool"))


def pool_conditions(recipe: Recipe, conditions: Conditions) -> Tensor:
    """[P], int64: forgotten classes in turn, or prompts at random."""
    count, forget = recipe.adversary.samples, torch.tensor(conditions.forget)
    if not recipe.uses_prompts:
        return forget[turns(len(forget), max(count, len(forget)))]
    index = torch.randint(len(forget), (count,), generator=draws.generator(recipe.seed, "adversary-prompts"))
    return forget[index]


@torch.no_grad()
def draw_pool(
    recipe: Recipe, conditions: Conditions, generator: Denoiser, poll: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor, Tensor]:
    """(images, conditions, images of their covers) of a pool that this generator draws now; poll is called before every batch
    and may raise."""
    c = pool_conditions(recipe, conditions)
    z = pool_noise(recipe.seed, (len(c), *generator.sample_shape))

    def drawn(c: Tensor) -> Tensor:
        images = []
        for z_i, c_i in zip(z.split(pieces_of(recipe)), c.split(pieces_of(recipe))):
            poll()
            z_i, c_i = z_i.to(generator.device), c_i.to(generator.device)
            if recipe.one_step:
                found = generate(generator, z_i, c_i, recipe.timesteps.init)
            else:
                found = denoised(generator, z_i, c_i, recipe.images.steps, recipe.images.guidance)
            images.append(found.float())
        return torch.cat(images)

    images = drawn(c)
    covers = drawn(_covers_of(conditions, c)) if recipe.adversary.half_way else images[:0].clone()
    return images, c.to(generator.device), covers


def _covers_of(conditions: Conditions, c: Tensor) -> Tensor:
    """What is drawn in the place of forgotten conditions, [N]."""
    forget, cover = conditions.pairs(c.device)
    return cover[(c[:, None] == forget).int().argmax(1)]


def pieces_of(recipe: Recipe) -> int:
    """Samples that pass θ at once."""
    return recipe.engine.micro_batch or recipe.batch_size


def start_of(
    recipe: Recipe, conditions: Conditions, own: OwnVectors, k: int, life: int, device: torch.device
) -> Tensor:
    """Where vector k begins its life number `life` (the first is 0), [1, …]: its starts take turns."""
    starts = recipe.adversary.starts
    kind = starts[(k + life) % len(starts)]
    rng = draws.generator(recipe.seed, f"adversary-start-{k}", life, device)
    choices = conditions.kept(device) if kind == "kept" else conditions.pairs(device)[0]
    chosen = torch.randint(len(choices), (1,), generator=rng, device=device)
    if kind == "forget" and not recipe.uses_prompts:
        chosen = torch.full_like(chosen, k % len(choices))  # the class it is fitted to
    value = own(choices[chosen])
    if kind == "random":
        noise = torch.randn(value.shape, generator=rng, device=device).to(value)
        return noise * value.square().mean().sqrt()
    return near(value, NEAR, [rng])


def first_starts(recipe: Recipe, conditions: Conditions, own: OwnVectors, device: torch.device) -> Tensor:
    """Where all vectors begin, [K, …]."""
    count = recipe.adversary.conditions
    return torch.cat([start_of(recipe, conditions, own, k, 0, device) for k in range(count)])


def restarting(recipe: Recipe, step: int) -> tuple[int, int] | None:
    """(vector, life) that begins afresh before iteration `step`; None where all go on."""
    every, count = recipe.adversary.restart, recipe.adversary.conditions
    if not every or not step or step % every:
        return None
    turn = step // every - 1
    return turn % count, turn // count + 1


def attack_of(
    recipe: Recipe, conditions: Conditions, adversary: Adversary, network: Denoiser, step: int, n: int
) -> Attack:
    """What attack step number `n` of iteration `step` is taken on: a vector that is fitted to a class sees its images alone."""
    options = recipe.adversary
    size, device = options.batch or recipe.batch_size, adversary.images.device
    number = step * options.steps + n
    rng = draws.generator(recipe.seed, "adversary-batch", number, device)
    which = turns(adversary.count, size, device, start=number * size)
    pool = len(adversary.c)
    if recipe.uses_prompts:
        index = torch.randint(pool, (size,), generator=rng, device=device)
    else:
        classes = len(conditions.forget)
        index = which % classes + classes * torch.randint(pool // classes, (size,), generator=rng, device=device)
    codes = network.free_codes(which, adversary.c[index])
    z, t = adversary.z[index], torch.full_like(codes, recipe.timesteps.init)
    if not recipe.one_step:
        z = torch.randn(z.shape, generator=rng, device=device)
        t = torch.randint(recipe.timesteps.min, recipe.timesteps.max, (size,), generator=rng, device=device)
    return Attack(z, adversary.images[index], codes, t)


def coded(recipe: Recipe, conditions: Conditions, batch: Batch, network: Denoiser, step: int) -> Batch:
    """A forget branch of iteration `step` in which θ draws `adversary.share` of the samples under its vectors, in turn.

    ψ is still told the forgotten condition, φ the cover: of the class a vector is fitted to, or of the prompt as it was drawn.
    The shares of pieces, ranks and few samples come out even, because samples are counted over all iterations.
    """
    n, device = len(batch.c_g), batch.c_g.device
    position = torch.arange(step * n, (step + 1) * n, device=device, dtype=torch.float64)
    before = torch.floor(position * recipe.adversary.share)  # adversarial samples before this one
    chosen = torch.floor((position + 1) * recipe.adversary.share) > before
    which = before.long() % recipe.adversary.conditions
    c_f, c_o = batch.c_g, batch.c_p
    if not recipe.uses_prompts:
        forget, cover = conditions.pairs(device)
        c_f, c_o = forget[which % len(forget)], cover[which % len(forget)]
    return replace(
        batch,
        c_g=torch.where(chosen, network.free_codes(which, c_f), batch.c_g),
        c_s=torch.where(chosen, c_f, batch.c_s),
        c_p=torch.where(chosen, c_o, batch.c_p),
    )


def half_way(
    recipe: Recipe, adversary: Adversary, batch: Batch, network: Denoiser, generator: torch.Generator
) -> Batch:
    """A forget branch in which `adversary.half_way` of the samples, drawn by the torch `generator`, begin where an ordinary
    denoiser comes by: at x_t of an image of the concept or of its cover, at any timestep from `EARLIEST` of the schedule on.
    Samples under vectors are left as they are.

    x_t = b_t z with z = e + x a_t / b_t, so θ starts from it as it does from noise. Where the network has an empty condition,
    `EMPTY` of those in which the concept is still to be seen (t ≤ t_init) are drawn under it, and ψ learns all of them under it:
    they are means, and no samples of the forgotten condition.
    """
    options, n, device = recipe.adversary, len(batch.z), batch.z.device
    if options.half_way == 0:
        return batch
    last = network.schedule.num_timesteps
    chosen = torch.rand(n, generator=generator, device=device) < options.half_way / (1 - options.share)
    chosen &= batch.c_g == batch.c_s
    index = torch.randint(len(adversary.images), (n,), generator=generator, device=device)
    concept, empty = (torch.rand(n, generator=generator, device=device) < share for share in (0.5, EMPTY))
    t = torch.randint(round(EARLIEST * last), last, (n,), generator=generator, device=device)
    a, b = network.schedule.coefficients(t)
    x = torch.where(concept.view_as(a), adversary.images[index], adversary.covers[index]).to(batch.z)
    z = torch.where(chosen.view_as(a), batch.z + a / b * x, batch.z)
    moved = replace(batch, z=z, t_g=torch.where(chosen, t, batch.t_g))
    if network.null_class is None:
        return moved
    null = torch.full_like(batch.c_g, network.null_class)
    empty &= chosen & concept & (t <= recipe.timesteps.init)
    return replace(moved, c_g=torch.where(empty, null, batch.c_g), c_s=torch.where(chosen, null, batch.c_s))
