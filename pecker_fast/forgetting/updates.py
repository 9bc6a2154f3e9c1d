"""How the gradients of the two branches become an update of θ.

A rule names its `phases`: the branches whose gradients one update needs. The engine runs the phases in order, each at the
weights the one before left behind, and hands over one gradient list per branch (`separate`), or their sum.
"""

from collections.abc import Sequence
from typing import ClassVar

from pecker_kernels import MaskedAdam, SaliencyMask
from torch import Tensor, nn

from pecker_fast.recipe import Recipe

Gradients = Sequence[Tensor | None]  # aligned with the parameters; None where no gradient arrives


def adam(
    recipe: Recipe, named: list[tuple[str, nn.Parameter]], lr: float, mask: SaliencyMask | None = None
) -> MaskedAdam:
    """The recipe's Adam over named parameters; with a mask it keeps moments for the salient weights alone."""
    options = recipe.optimizer
    return MaskedAdam(
        named,
        mask=mask,
        lr=lr,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
        clip_value=options.clip_value,
    )


class UpdateRule:
    """Base: owns the optimizers of θ (`optimizers`, by name, in checkpoint order) and the mask they follow."""

    phases: ClassVar[tuple[tuple[str, ...], ...]] = (("retain", "forget"),)
    separate: ClassVar[bool] = False

    def __init__(self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None) -> None:
        self.parameters = [p for _, p in named]
        self.mask = mask
        self.optimizers = self.build(recipe, named, mask)

    def build(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> dict[str, MaskedAdam]:
        raise NotImplementedError

    def limits(self, group: Sequence[str]) -> bool:
        """Whether the gradients of these branches move weights of the mask alone; they may then be compact."""
        return False

    def optimizer_of(self, phase: tuple[str, ...]) -> MaskedAdam:
        """Whose step a phase ends in."""
        return self.optimizers["generator"]

    def apply(self, phase: tuple[str, ...], gradients: dict[str, Gradients]) -> MaskedAdam:
        """One update; returns the optimizer that made it. gradients: per branch when `separate`, else the weighted sum
        under the key "sum"."""
        raise NotImplementedError

    def set_mask(self, mask: SaliencyMask) -> None:
        """Refresh: moments follow the weights that stay."""
        self.mask = mask
        for optimizer in self.optimizers.values():
            if optimizer.mask is not None:
                optimizer.set_mask(mask)

    def _give(self, gradients: Gradients) -> None:
        for p, g in zip(self.parameters, gradients):
            p.grad = g

    def _step(
        self, phase: tuple[str, ...], masked: Gradients | None = None, compact: Gradients | None = None
    ) -> MaskedAdam:
        optimizer = self.optimizer_of(phase)
        optimizer.step(masked_grads=masked, compact_grads=compact)
        return optimizer


class Dense(UpdateRule):
    """One dense Adam step on g_r∇L_sd + g_f∇L_sfd."""

    def build(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> dict[str, MaskedAdam]:
        return {"generator": adam(recipe, named, recipe.lr.generator)}

    def apply(self, phase: tuple[str, ...], gradients: dict[str, Gradients]) -> MaskedAdam:
        self._give(gradients["sum"])
        return self._step(phase)


class Differentiated(UpdateRule):
    """The paper's rule: one dense Adam step on g_r∇L_sd + m ⊙ g_f∇L_sfd."""

    separate = True

    def build(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> dict[str, MaskedAdam]:
        return {"generator": adam(recipe, named, recipe.lr.generator, mask)}

    def limits(self, group: Sequence[str]) -> bool:
        return list(group) == ["forget"]

    def apply(self, phase: tuple[str, ...], gradients: dict[str, Gradients]) -> MaskedAdam:
        self._give(gradients["retain"])
        return self._step(phase, gradients["forget"])


class SalientOnly(UpdateRule):
    """Both branches masked: salient weights alone are stepped and have moments, all others stay bit-identical."""

    def build(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> dict[str, MaskedAdam]:
        return {"generator": adam(recipe, named, recipe.lr.generator, mask)}

    def limits(self, group: Sequence[str]) -> bool:
        return True

    def apply(self, phase: tuple[str, ...], gradients: dict[str, Gradients]) -> MaskedAdam:
        return self._step(phase, compact=gradients["sum"])


class Alternating(UpdateRule):
    """A masked forget step, then a full retain step: two optimizers with moments and step counts of their own."""

    phases = (("forget",), ("retain",))

    def build(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> dict[str, MaskedAdam]:
        lr = recipe.lr.generator
        return {"generator_forget": adam(recipe, named, lr, mask), "generator_retain": adam(recipe, named, lr)}

    def limits(self, group: Sequence[str]) -> bool:
        return list(group) == ["forget"]

    def optimizer_of(self, phase: tuple[str, ...]) -> MaskedAdam:
        return self.optimizers["generator_" + phase[0]]

    def apply(self, phase: tuple[str, ...], gradients: dict[str, Gradients]) -> MaskedAdam:
        if phase == ("forget",):
            return self._step(phase, compact=gradients["sum"])
        self._give(gradients["sum"])
        return self._step(phase)


class DifferentiatedSum(Differentiated):
    """`differentiated` where the optimizer is handed the sum g_r∇L_sd + m ⊙ g_f∇L_sfd: its step is a dense one."""

    def build(
        self, recipe: Recipe, named: list[tuple[str, nn.Parameter]], mask: SaliencyMask | None
    ) -> dict[str, MaskedAdam]:
        return {"generator": adam(recipe, named, recipe.lr.generator)}


RULES: dict[str, type[UpdateRule]] = {
    "differentiated": Differentiated,
    "salient_only": SalientOnly,
    "alternating": Alternating,
}
