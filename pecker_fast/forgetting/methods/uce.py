"""UCE (arXiv 2308.14761): keys and values of cross-attention, edited in closed form."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pecker_fast.conditions import Conditions
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting.objective import Edit, Networks
from pecker_fast.networks import TextDenoiser, aligned_tokens
from pecker_fast.recipe import Recipe

EDITED = (".attn2.to_k", ".attn2.to_v")


class UCE(Edit):
    """W ← (g_f Σ_f W c_o c_fᵀ + g_r Σ_r W c_r c_rᵀ + λ W) (g_f Σ_f c_f c_fᵀ + g_r Σ_r c_r c_rᵀ + λ I)⁻¹, the minimum of
    g_f Σ_f ‖W' c_f − W c_o‖² + g_r Σ_r ‖W' c_r − W c_r‖² + λ ‖W' − W‖².

    Σ over the tokens of a prompt, means over prompts: how many of them there are does not move the balance.
    """

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if not recipe.uses_prompts:
            raise RecipeError(
                "method: uce edits cross-attention, and this model draws from classes; use spare or pecker"
            )

    @torch.no_grad()
    def edit(self, recipe: Recipe, networks: Networks, conditions: Conditions) -> None:
        theta = networks.generator
        assert isinstance(theta, TextDenoiser)
        moved, inner = moments(theta, recipe, conditions)
        for _, layer in edited(theta.unet):
            weight = layer.weight
            new = torch.linalg.solve(inner, (weight.double() @ moved).T).T  # inner is symmetric
            weight.copy_(new.to(weight))


def edited(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers whose weights are solved for, by name."""
    for name, layer in unet.named_modules():
        if name.endswith(EDITED) and isinstance(layer, nn.Linear):
            yield name, layer


def moments(theta: TextDenoiser, recipe: Recipe, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """(g_f Σ c_o c_fᵀ + g_r Σ c_r c_rᵀ + λ I, the same with c_f in the place of c_o), float64 [D, D] each."""
    table, w = theta.table, recipe.weights
    pairs = [aligned_tokens(table, f, o) for f, o in zip(conditions.forget, conditions.cover)]
    kept = [(row, row) for row in _embeds(table.embeds, conditions.retain)]
    eye = torch.eye(table.embeds.shape[-1], dtype=torch.float64, device=table.embeds.device)
    moved, inner = recipe.objective.ridge * eye, recipe.objective.ridge * eye
    for weight, found in ((w.forget, pairs), (w.retain, kept)):
        for asked, answered in found:
            asked, answered = asked.double(), answered.double()
            moved = moved + weight / len(found) * answered.T @ asked
            inner = inner + weight / len(found) * asked.T @ asked
    return moved, inner


def _embeds(embeds: Tensor, rows: Sequence[int]) -> list[Tensor]:
    return [embeds[row] for row in rows]
