"""Where x_t comes from in methods that leave a model of many steps: images drawn once by the model itself, or its own way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast import draws
from pecker_fast.conditions import Conditions
from pecker_fast.forgetting.batch import Batch
from pecker_fast.forgetting.samplers import batch_of, ddim_scheduler, denoised
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe


@dataclass(frozen=True)
class Pool:
    """Samples of the network by branch, with the conditions they stand for and their covers."""

    images: Mapping[str, Tensor]  # branch -> [P, C, H, W] float32
    c: Mapping[str, Tensor]  # branch -> [P]
    covers: Mapping[str, Tensor]  # branch -> [P]; of kept samples their own condition
    times: Tensor | None = None  # [T], how often a timestep is drawn; None = evenly

    def draw(self, branch: str, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(images, conditions, covers) of n of them, drawn by the torch generator."""
        index = torch.randint(len(self.c[branch]), (n,), generator=rng, device=rng.device)
        return self.images[branch][index], self.c[branch][index], self.covers[branch][index]

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a file has them."""
        parts = {"images": self.images, "c": self.c, "covers": self.covers}
        found = {f"{branch}.{kind}": one[branch] for kind, one in parts.items() for branch in one}
        return found if self.times is None else found | {"times": self.times}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Pool":
        """Inverse of `tensors`. Raises KeyError."""
        branches = {name.partition(".")[0] for name in tensors if "." in name}

        def kind(name: str) -> dict[str, Tensor]:
            return {branch: tensors[f"{branch}.{name}"].to(device) for branch in sorted(branches)}

        times = tensors["times"].to(device) if "times" in tensors else None
        return cls(kind("images"), kind("c"), kind("covers"), times)


@dataclass(frozen=True)
class OwnImages:
    """Images of the user. rows: condition -> int64 indices of its images; read: indices [n] -> samples [n, C, H, W], float32."""

    rows: Mapping[int, Tensor]
    read: Callable[[Tensor], Tensor]

    def of(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(which of the conditions [N] have images, bool [N]; an image for each of those): conditions deal their own in turn."""
        dealt: dict[int, int] = {}
        index = []
        for one in c.tolist():
            images = self.rows.get(one)
            if images is None:
                index.append(-1)
                continue
            place = dealt[one] = dealt.get(one, -1) + 1
            index.append(int(images[place % len(images)]))
        found = torch.tensor(index)
        return found >= 0, found[found >= 0]


@torch.no_grad()
def make_pool(
    recipe: Recipe, conditions: Conditions, teacher: Denoiser, pooled: Mapping[str, str],
    poll: Callable[[], object] = lambda: None, own_images: OwnImages | None = None,
) -> Pool:  # fmt: skip
    """A pool drawn by the teacher's own sampler, a function of the recipe's seed; of conditions that `own_images` has images of,
    these. pooled: branch -> whose images it holds, see `asked_for`; poll is called before every
    batch and may raise."""
    options = recipe.images
    images, c, covers = {}, {}, {}
    for branch, whose in pooled.items():
        rng = draws.generator(recipe.seed, f"pool-{branch}", 0, "cpu")
        own, cover = conditions.draw(branch, options.samples, rng)
        z = torch.randn(options.samples, *teacher.sample_shape, generator=rng)
        asked, x_0 = asked_for(whose, own, cover), torch.empty_like(z, device=teacher.device)
        drawn = torch.arange(len(asked))
        if own_images is not None:
            theirs, images_of = own_images.of(asked)
            if bool(theirs.any()):
                x_0[theirs] = own_images.read(images_of).to(x_0)
            drawn = drawn[~theirs]
        for index in drawn.split(batch_of(teacher)) if len(drawn) else ():
            poll()
            z_i, c_i = z[index].to(teacher.device), asked[index].to(teacher.device)
            x_0[index] = denoised(teacher, z_i, c_i, options.steps, options.guidance).float()
        images[branch], c[branch], covers[branch] = x_0, own.to(teacher.device), cover.to(teacher.device)
    return Pool(images, c, covers)


def asked_for(whose: str, own: Tensor, cover: Tensor) -> Tensor:
    """Conditions [N] that images are drawn of: the "own" ones, their "cover", or "both" in turn."""
    if whose == "both":
        return torch.where(torch.arange(len(own)) % 2 == 0, own, cover)
    return own if whose == "own" else cover


@torch.no_grad()
def along(recipe: Recipe, theta: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
    """(x_t, t [N]) on θ's own way from noise under the branch's condition: all samples stop at one timestep, the sampler's
    nearest below the first of the batch's."""
    options = recipe.images
    wanted = int(batch.t[0])
    scheduler = ddim_scheduler(theta, options.steps)
    stop = max((int(t) for t in scheduler.timesteps if int(t) <= wanted), default=int(scheduler.timesteps[-1]))
    x = batch.z
    for t in scheduler.timesteps:
        if int(t) <= stop:
            break
        output = theta.output(x, t.to(x.device).expand(len(x)), batch.c_g, options.guidance)
        x = scheduler.step(output, t, x).prev_sample
    return x, torch.full_like(batch.t, stop)
