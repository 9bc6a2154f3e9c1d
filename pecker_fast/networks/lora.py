"""Networks as low-rank adapters on another's weights: ψ = φ + adapters (`score: lora`), θ = its start + adapters (`student: lora`).

An adapted layer gives y = base(x) + gate_n · scale · B(A(x)). φ and ψ then differ by rows of a batch, not by network: one pass
serves both. Of a student under a mask m the product counts where the mask keeps the weight: W + m ⊙ scale · B A.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pecker_fast import draws
from pecker_fast.errors import ModelError
from pecker_fast.networks.denoiser import Denoiser

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = ("attention", "all")
Rows = Tensor | slice | None


class LowRank(nn.Module):
    """B(A(x)) beside one Linear or Conv2d: A is a layer of the base's geometry to `rank` channels, B is 1×1. B starts at zero.

    The rank is at most what the layer's matrix can have. kept: where the product counts: None = everywhere, whole rows [out], or
    [out, …] as the base's weight.
    """

    kept: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, *inside = layer.weight.shape
        rank = min(rank, out, math.prod(inside))
        a = torch.empty(rank, *inside)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(a.to(layer.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(out, rank, *(1 for _ in inside[1:]), device=layer.weight.device))
        self.register_buffer("kept", None, persistent=False)

    @property
    def scattered(self) -> bool:
        """Whether single weights are kept: such a change is no product of low rank."""
        return self.kept is not None and self.kept.dim() > 1

    def keep(self, kept: Tensor) -> None:
        """Let the product count where `kept`, bool in the shape of the base's weight, says."""
        flat = kept.flatten(1)
        whole, some = flat.all(1), flat.any(1)
        self.kept = None if bool(whole.all()) else whole if torch.equal(whole, some) else kept

    def b(self) -> Tensor:
        """B, zero in rows that are not kept."""
        if self.kept is None or self.scattered:
            return self.lora_b
        return self.lora_b * self.kept.view(-1, *(1 for _ in self.lora_b.shape[1:]))

    def product(self) -> Tensor:
        """B A in the shape of the base's weight, float32."""
        return (self.b().flatten(1) @ self.lora_a.flatten(1)).view(-1, *self.lora_a.shape[1:])

    def added_to(self, weight: Tensor, scale: float) -> Tensor:
        """weight + scale · B A; what is not kept is the weight to the bit."""
        found = (weight.float() + scale * self.product()).to(weight.dtype)
        if self.kept is None:
            return found
        kept = self.kept if self.scattered else self.kept.view(-1, *(1 for _ in weight.shape[1:]))
        return torch.where(kept, found, weight)


class AdaptedUNet(nn.Module):
    """A UNet with adapters, called as the UNet itself is; the base is shared, frozen and no part of parameters or state_dict.

    Called as it is, all rows get the adapters (ψ). Inside `rows`, calls of `base` do as the rows say; outside, the base is
    without a trace of them. A deep copy has adapters of its own over the same base. `.to` moves the base too.

    rank: of every adapter. targets: "all" Linear and Conv2d layers, or those of "attention" alone. scale: of B(A(x)).
    Raises ModelError for layers that cannot be adapted.
    """

    base: Any

    def __init__(
        self, base: nn.Module, rank: int = 16, targets: str = "all", seed: int = 0, scale: float = 1.0
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ModelError(f"adapters need a rank of at least 1, got {rank}")
        base.requires_grad_(False)
        self.__dict__["base"] = base  # past nn.Module, which would list its weights as ours
        self.options: dict[str, Any] = {"rank": rank, "targets": targets, "seed": seed, "scale": scale}
        self.scale = scale
        self._rows: Rows = None
        self._active = False
        self._swaps: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for name, layer in target_layers(base, targets):
            adapter = LowRank(layer, rank, draws.generator(seed, f"lora.{name}"))
            *path, last = name.split(".")
            parent: nn.Module = self
            for key in path:
                if key not in parent._modules:
                    parent.add_module(key, nn.Module())
                parent = parent.get_submodule(key)
            parent.add_module(last, adapter)
            self._swaps.append((layer, partial(self._adapted, layer.forward, layer, adapter)))
        self._blocks: list[Any] = [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]

    @property
    def config(self) -> Any:
        return self.base.config

    def adapters(self) -> dict[str, LowRank]:
        """By name of the base's layer."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LowRank)}

    def restrict(self, kept: Callable[[str], Tensor]) -> None:
        """Keep of every product what a mask keeps of the base's weight of that name (bool). Layers that keep nothing lose their
        adapter."""
        for name, adapter in self.adapters().items():
            bits = kept(f"{name}.weight")
            if bool(bits.any()):
                adapter.keep(bits)
            else:
                self.drop(name)

    def drop(self, name: str) -> None:
        """The layer goes on without an adapter."""
        path, _, last = name.rpartition(".")
        parent, layer = self.get_submodule(path), self.base.get_submodule(name)
        del parent._modules[last]
        self._swaps = [swap for swap in self._swaps if swap[0] is not layer]

    def enable_gradient_checkpointing(self, *args: Any, **keys: Any) -> None:
        """The base's, whose passes these are: φ's run with it as well."""
        self.base.enable_gradient_checkpointing(*args, **keys)

    def forward(self, *args: Any, **keys: Any) -> Any:
        with self.rows(None):
            return self.base(*args, **keys)

    @contextlib.contextmanager
    def rows(self, rows: Rows) -> Iterator[None]:
        """Inside, calls of `base` add the adapters to some rows of the batch. Go backward outside.

        rows: None = all; a tensor [N] of zeros and ones, the gate; or slice(first, N): the rows from `first` on of N, which
        costs the adapters of these rows alone.
        """
        if self._active:
            before, self._rows = self._rows, rows
            try:
                yield
            finally:
                self._rows = before
            return
        layers = [(layer.__dict__, layer.__dict__.get("forward")) for layer, _ in self._swaps]
        blocks = [block for block in self._blocks if block.gradient_checkpointing]
        functions = [block._gradient_checkpointing_func for block in blocks]
        try:
            self._active, self._rows = True, rows
            for layer, adapted in self._swaps:
                layer.__dict__["forward"] = adapted  # a callable, past nn.Module's own attribute rules
            for block, function in zip(blocks, functions):
                block._gradient_checkpointing_func = partial(self._checkpoint, function)
            yield
        finally:
            self._active, self._rows = False, None
            for attributes, forward in layers:
                if forward is None:
                    attributes.pop("forward", None)
                else:
                    attributes["forward"] = forward
            for block, function in zip(blocks, functions):
                block._gradient_checkpointing_func = function

    def _checkpoint(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """Passes that gradient checkpointing repeats on the way back see the rows of the pass itself."""
        return checkpoint(partial(self._under, self._rows, function), *args)

    def _under(self, rows: Rows, function: Callable[..., Any], *args: Any) -> Any:
        with self.rows(rows):
            return function(*args)

    def _adapted(self, base: Callable[[Tensor], Tensor], layer: nn.Module, adapter: LowRank, x: Tensor) -> Tensor:
        if adapter.scattered and self._rows is None:  # one product with the sum, as the network will be exported
            found: Any = layer
            weight = adapter.added_to(found.weight, self.scale)
            if isinstance(layer, nn.Conv2d):
                return layer._conv_forward(x, weight, layer.bias)
            return F.linear(x, weight, found.bias)
        rows, y = self._rows, base(x)
        count = rows.stop if isinstance(rows, slice) else x.shape[0] if rows is None else rows.shape[0]
        if x.shape[0] != count:
            raise ModelError(
                f"adapters: a layer is fed {x.shape[0]} rows of a batch of {count}; do not split the batch"
            )
        first = rows.start if isinstance(rows, slice) else 0
        x = x[first:]
        a, b = adapter.lora_a.to(x.dtype), adapter.b().to(x.dtype)
        h = layer._conv_forward(x, a, None) if isinstance(layer, nn.Conv2d) else F.linear(x, a)
        if isinstance(rows, Tensor):
            h = h * rows.to(h.dtype).view(-1, *(1 for _ in h.shape[1:]))
        if self.scale != 1:
            h = self.scale * h
        delta = F.conv2d(h, b) if isinstance(layer, nn.Conv2d) else F.linear(h, b)
        if torch.compiler.is_compiling():  # knows no function that writes in place, and fuses the plain form
            return torch.cat([y[:first], y[first:] + delta]) if first else y + delta
        return _AddToTail.apply(y, delta.to(y.dtype), first)

    def merged(self) -> nn.Module:
        """A network of its own with the weights φ + scale · B A, frozen, without adapters: ψ for export."""
        network: nn.Module = copy.deepcopy(self.base)
        with torch.no_grad():
            for name, adapter in self.adapters().items():
                weight: Any = network.get_submodule(name).weight
                weight.copy_(adapter.added_to(weight, self.scale))
        return network

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedUNet":
        self.base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdaptedUNet":
        twin = AdaptedUNet(self.base, **self.options)
        twin.train(self.training)
        ours = self.adapters()
        for name, adapter in twin.adapters().items():
            if name in ours:
                adapter.kept = ours[name].kept
            else:
                twin.drop(name)
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), twin.parameters()):
                theirs.data = mine.detach().clone()
                theirs.requires_grad_(mine.requires_grad)
        return twin


class _AddToTail(torch.autograd.Function):
    """y[first:] += delta in place; the plain form would copy the whole gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, delta: Tensor, first: int) -> Tensor:
        ctx.first = first
        ctx.mark_dirty(y)
        y[first:] += delta
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad[ctx.first :], None


def target_layers(unet: nn.Module, targets: str) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """(name, layer) to adapt, in named_parameters order. Raises ModelError for a target that is no plain Linear or Conv2d."""
    from diffusers.models.downsampling import FirDownsample2D
    from diffusers.models.upsampling import FirUpsample2D

    if targets not in TARGETS:
        raise ModelError(f"adapters: targets {targets!r} is not one of {', '.join(TARGETS)}")
    found: list[tuple[str, nn.Linear | nn.Conv2d]] = []
    for name, module in unet.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if targets == "attention":
            wanted = any(name.endswith(f".{end}") for end in ATTENTION)
        else:
            wanted = bool(weights) and not isinstance(module, nn.Embedding)
        parent = unet.get_submodule(name.rpartition(".")[0])
        fits = isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1
        if wanted and (
            not fits
            or not module.weight.is_floating_point()
            or isinstance(parent, FirDownsample2D | FirUpsample2D)  # take the weight and never call the layer
            or getattr(parent, "fused_projections", False)
        ):
            raise ModelError(
                f"adapters on unsupported layers: {name} is a {type(module).__name__} of {type(parent).__name__}, they go on "
                "plain Linear and Conv2d layers; use score=full and student=full"
            )
        if wanted:
            found.append((name, module))
    if not found:
        raise ModelError(
            f"adapters: {type(unet).__name__} has no layers for targets {targets!r}; use score=full and student=full"
        )
    return found


def adaptable(network: Denoiser, targets: str) -> set[str]:
    """Names of the weights that adapters stand beside. Raises ModelError as `target_layers`."""
    return {f"{name}.weight" for name, _ in target_layers(network.base, targets)}


def with_adapters(start: Denoiser, rank: int = 16, targets: str = "all", seed: int = 0, scale: float = 1.0) -> Denoiser:
    """A network + adapters, equal to it bit for bit at the start: its like (whatever kind of Denoiser it is), with an AdaptedUNet
    over its very own network, which stays frozen for ever. Its parameters are the adapters', float32.
    """
    adapted = copy.copy(start)
    adapted.unet = AdaptedUNet(start.unet, rank, targets, seed, scale).eval()
    return adapted


def same_function(teacher: Denoiser, score: Denoiser) -> bool:
    """Whether φ and ψ are one function, to the bit: equal weights, or adapters that add nothing yet."""
    if isinstance(score.unet, AdaptedUNet):
        ends = [p for name, p in score.named_parameters() if name.endswith("lora_b")]
        return score.unet.base is teacher.unet and not any(bool(p.any()) for p in ends)
    ours, theirs = score.named_parameters(), dict(teacher.named_parameters())
    return len(ours) == len(theirs) and all(name in theirs and torch.equal(p, theirs[name]) for name, p in ours)


def pair_x0(
    teacher: Denoiser,
    score: Denoiser,
    x_t: Tensor,  # [N, C, H, W]
    t: Tensor,  # [N]
    c_p: Tensor,  # [N], condition of the teacher
    c_g: Tensor,  # [N], condition of the score network
    w_teacher: float = 1.0,  # guidance
    w_score: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(f_φ(x_t, c_p), f_ψ(x_t, c_g)), each [N, C, H, W].

    One pass of 2N rows where the score network is `with_adapters` of this teacher, and N more for every guided side; otherwise
    a pass for each.
    """
    adapted: Any = score.unet
    guided = w_teacher != 1.0 or w_score != 1.0
    unshared = not isinstance(adapted, AdaptedUNet) or adapted.base is not teacher.unet
    if unshared or (guided and teacher.null_class is None):  # guidance is then refused in `x0`'s own words
        return teacher.x0(x_t, t, c_p, w_teacher), score.x0(x_t, t, c_g, w_score)
    null: Any = teacher.null_class
    conditions: list[Tensor] = []
    counts: list[int] = []
    for c, w in ((c_p, w_teacher), (c_g, w_score)):
        conditions += [c] if w == 1.0 else [c, torch.full_like(c, null)]
        counts.append(c.shape[0] * (1 if w == 1.0 else 2))
    copies = len(conditions)
    with adapted.rows(slice(counts[0], sum(counts))):
        out = teacher._forward(x_t.repeat(copies, 1, 1, 1), t.repeat(copies), torch.cat(conditions))
    sides = []
    for side, w in zip(out.split(counts), (w_teacher, w_score)):
        if w != 1.0:
            conditional, unconditional = side.chunk(2)
            side = unconditional + w * (conditional - unconditional)
        sides.append(teacher.schedule.to_x0(side, x_t, t))
    return sides[0], sides[1]
