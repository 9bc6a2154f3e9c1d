"""Tensors that are in no mask (`mask.exclude`, `mask.only`)."""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from pecker_kernels import SaliencyMask
from torch import Size

from pecker_fast.errors import RecipeError
from pecker_fast.networks import Denoiser, adaptable
from pecker_fast.recipe import Recipe, closest, show


def check_exclude(recipe: Recipe, generator: Denoiser) -> None:
    """Raise RecipeError, before anything runs, for patterns that fit nothing, and where they leave too little for the mask."""
    if recipe.uses_mask:
        sizes = {name: p.numel() for name, p in generator.whole_parameters()}
        left_out = excluded(recipe, sizes, generator)
        total = sum(sizes.values())
        share_of_rest(recipe, total, total - sum(sizes[name] for name in left_out))


def excluded(recipe: Recipe, names: Collection[str], generator: Denoiser) -> set[str]:
    """Of the names of all tensors those that are in no mask: of a LoRA student also what has no adapter. Raises RecipeError for a
    pattern that fits none."""
    left_out = _named(recipe.mask.exclude, names, "mask.exclude")
    if recipe.mask.only:
        left_out |= set(names) - _named(recipe.mask.only, names, "mask.only")
    if recipe.student == "lora":
        left_out |= set(names) - adaptable(generator, recipe.lora.targets)
    return left_out


def _named(patterns: Sequence[str], names: Collection[str], key: str) -> set[str]:
    """The names that fit one of the patterns. Raises RecipeError for a pattern that fits none."""
    found: set[str] = set()
    for pattern in patterns:
        fits = {name for name in names if fnmatchcase(name, pattern)}
        if not fits:
            near = closest(pattern, names) or closest(pattern, {name.partition(".")[0] + ".*" for name in names})
            hint = f"did you mean {near}?" if near else "`pecker-fast mask RUN` lists the tensors of a run"
            raise RecipeError(f"{key}: {show(pattern)} is no tensor of this model; {hint}")
        found |= fits
    return found


def share_of_rest(recipe: Recipe, total: int, rest: int) -> float:
    """The density among the `rest` weights that may be in a mask; of `total` weights it is the recipe's, where one threshold serves
    all tensors. Raises RecipeError where that is more than there are."""
    density = recipe.mask.density
    if not rest:
        raise RecipeError("mask.exclude: leaves no tensor for the mask; leave one out, or use mask.source=none")
    if rest == total or recipe.mask.scope == "tensor" or recipe.mask.threshold is not None:
        return density
    if recipe.mask.source == "names":
        return 1.0
    if density * total > rest:
        raise RecipeError(
            f"mask.density: {density:g} of all weights is more than mask.exclude leaves ({rest / total:.3g} of them); lower it"
        )
    return density * total / rest


def with_excluded(mask: SaliencyMask, shapes: Iterable[tuple[str, Size]]) -> SaliencyMask:
    """The mask of all tensors, which keeps nothing of those that are not in this one. shapes: of all, in their order."""
    every = dict(shapes)
    if list(every) == mask.names:
        return mask
    device = next(iter(mask.bits.values())).device
    bits = {
        name: mask.bits[name]
        if name in mask.bits
        else torch.zeros((n.numel() + 7) // 8, dtype=torch.uint8, device=device)
        for name, n in every.items()
    }
    return SaliencyMask(
        bits, every, structure=mask.structure, scope=mask.scope, tile=mask.tile, threshold=mask.threshold,
        provenance=mask.provenance,
    )  # fmt: skip
