"""Put the plans into a model, hand its gradients out, take the plans out again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adam.lanes import Lanes
from ..dispatch import check_impl, resolve
from ..errors import PeckerKernelsError
from ..mask.saliency import SaliencyMask
from .conv import is_channels_last
from .function import LayerPlan, LiveForward, Switch
from .plan import SMALLEST_TILE, Part, plan_bias, plan_weight, products_of, servable, uses_triton
from .report import LayerReport, report_layer

BUILT = ("auto", "triton", "reference")
_ACTIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(slots=True)
class _Entry:
    """One parameter. leaf: where its gradient arrives, None = nowhere. lanes: the live weights in a gradient of rows."""

    name: str
    param: nn.Parameter
    leaf: Tensor | None
    lanes: Lanes | None = None


def _channels_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """torch 2.13 on a CPU writes a channels-last group norm's input gradient where none was asked for, above dead layers,
    and crashes; the other layout is sound."""
    if len(args) != 1:
        args, kwargs = (kwargs["input"],), {}
    (x,) = args
    if x.device.type != "cpu" or x.requires_grad or not torch.is_grad_enabled() or not is_channels_last(x):
        return None
    return (x.contiguous(),), {}


def skip_weight_gradients(model: nn.Module, mask: SaliencyMask, impl: str = "auto", prefix: str = "") -> SparseBackward:
    """From now on the backward pass of `model` computes gradients of live weights alone.

    Linear layers and convolutions without groups compute live rows (output channels), or live tiles under a tile mask;
    a layer without a live weight computes none and keeps no input, and back-propagation stops below the lowest live
    layer. Other layers, and those with a live weight in each row, stay as they are; dead parameters of any layer have
    requires_grad False meanwhile. Values of the forward pass do not change, but for last roundings where torch chooses its
    kernel by what requires a gradient (attention) or a group norm above dead layers changes layout.

    mask: of model.named_parameters(), named `prefix` + name; frozen parameters may be missing. impl, for linear layers
    under a tile mask: "triton" | "reference" | "auto" (Triton on a GPU where it can); all else is the library's.
    Weights are seen through their layer's forward alone: gradients of a partly live one that is also read elsewhere
    (weight decay in the loss) go to the parameter, and torch.func.functional_call finds none. Move or cast the model before.

    Raises MaskError for a mask of another model, PeckerKernelsError for an `impl` that is unknown or cannot serve and for
    a model that this was done to already.
    """
    if check_impl(impl, built=BUILT) == "triton":
        resolve(impl, *model.parameters(), built=BUILT)
    _refuse_active(model)
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    theirs = [name for name in mask.names if not name.startswith(prefix)]
    mask.check([*named, *((name, torch.empty(mask.shapes[name], device="meta")) for name in theirs)])
    return SparseBackward(model, mask, impl, prefix)


def _refuse_active(model: nn.Module) -> None:
    if any(m in _ACTIVE or isinstance(vars(m).get("forward"), LiveForward) for m in model.modules()):
        raise PeckerKernelsError("this model skips weight gradients already: undo the first")


class SparseBackward:
    """A model whose backward pass skips dead weights; made by `skip_weight_gradients`, left by `undo` or a with-block.

    A with-block after that takes it up again, as planned the first time: forward passes in it skip. Gradients of what they
    returned may be taken inside; later too, unless activation checkpointing runs the forward pass once more. Blocks nest: the
    outermost one undoes. A deep copy made meanwhile has its own forward, and dead parameters that are frozen.

    leaves: aligned with model.named_parameters(), what to differentiate for: the parameter itself (dense gradient), a
    tensor that stands for its live part, or None (dead, or frozen before): no gradient. active: until `undo`.
    """

    def __init__(self, model: nn.Module, mask: SaliencyMask, impl: str, prefix: str) -> None:
        self.model, self.mask = model, mask
        self.active = False
        self._depth = 0  # of with-blocks
        self._switch = Switch()
        self._hooks: list[RemovableHandle] = []
        self._swapped: list[tuple[nn.Module, LiveForward]] = []
        self._frozen: list[nn.Parameter] = []
        self._modes: dict[nn.Module, tuple[str, str]] = {}
        self._entries = {
            p: _Entry(prefix + name, p, p if p.requires_grad else None) for name, p in model.named_parameters()
        }
        plans = self._plan(impl)
        self._swapped = [(module, LiveForward(module, plan, self._switch)) for module, plan in plans.items()]
        for entry in self._entries.values():
            if entry.leaf is entry.param and not mask.count_of(entry.name):
                entry.leaf = None
            if entry.leaf is None and entry.param.requires_grad:
                self._frozen.append(entry.param)
        self._normed = [
            module
            for module in model.modules()
            if isinstance(module, nn.GroupNorm) and any(self._entries[p].leaf is not None for p in module.parameters())
        ]
        self._apply()

    def _apply(self) -> None:
        _refuse_active(self.model)
        for _, forward in self._swapped:
            if forward.is_stale():
                raise PeckerKernelsError(
                    "a weight was replaced, cast or moved since this was planned: skip its gradients anew"
                )
        self.active = True  # from here on there is something to undo
        try:
            _ACTIVE.add(self.model)
            for module, forward in self._swapped:
                module.forward = forward  # type: ignore[method-assign]
            self._freeze(True)
            for module in self._normed:
                self._hooks.append(module.register_forward_pre_hook(_channels_first, with_kwargs=True))
        except BaseException:
            self.undo()
            raise

    def _plan(self, impl: str) -> dict[nn.Module, LayerPlan]:
        """The layers whose forward changes. Nothing has been changed before the last of them is planned."""
        owners: dict[nn.Parameter, int] = {}
        for module in self.model.modules():
            for p in module._parameters.values():
                if p is not None:
                    owners[p] = owners.get(p, 0) + 1
        plans: dict[nn.Module, LayerPlan] = {}
        for module in self.model.modules():
            own = {key: p for key, p in module._parameters.items() if p is not None}
            weight = own.get("weight")
            if not servable(module) or weight is None or owners[weight] > 1 or not weight.requires_grad:
                continue
            triton = uses_triton(module, self.mask, impl)
            tiled = triton or impl == "reference" or min(self.mask.tile) >= SMALLEST_TILE
            part = plan_weight(weight, self.mask, self._entries[weight].name, tiled)
            if part.mode == "dense":
                continue
            bias = own.get("bias")
            bias_part = Part("dense")
            if bias is not None and bias.requires_grad and owners[bias] == 1:
                bias_part = plan_bias(bias, self.mask, self._entries[bias].name)
            leaf, bias_leaf = self._leaf(weight, part), None if bias is None else self._leaf(bias, bias_part)
            self._modes[module] = (part.mode, "triton" if triton and part.mode == "tiles" else "torch")
            plans[module] = LayerPlan(products_of(module, triton), part, bias_part, leaf, bias_leaf, weight.shape)
        return plans

    def _leaf(self, p: nn.Parameter, part: Part) -> Tensor | None:
        """A tensor that autograd sends the part's gradient to. Its values are read by nobody: one number, expanded."""
        entry = self._entries[p]
        if part.mode == "dense":
            return None
        entry.leaf, entry.lanes = None, part.lanes
        if part.mode != "dead":
            entry.leaf = torch.zeros((), dtype=p.dtype, device=p.device).expand(part.shape).requires_grad_()
        return entry.leaf

    def _freeze(self, frozen: bool) -> None:
        for p in self._frozen:
            p.requires_grad_(not frozen)

    @property
    def leaves(self) -> list[Tensor | None]:
        return [entry.leaf for entry in self._entries.values()]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes in here are the model's own, with dense weight gradients; take these in here too."""
        self._switch.paused += 1
        if self._switch.paused == 1:
            self._freeze(False)
        try:
            yield
        finally:
            self._switch.paused -= 1
            if self._switch.paused == 0:
                self._freeze(self.active)

    def compact(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the leaves -> one entry per parameter: None, a dense gradient of the parameter's shape, or the
        gradient [mask.count_of(name)] of its live weights in row-major order.

        grads: aligned with `leaves`, or with those that are not None (as torch.autograd.grad gives them).
        """
        entries = list(self._entries.values())
        live = [entry for entry in entries if entry.leaf is not None]
        if len(grads) not in (len(live), len(entries)):
            raise PeckerKernelsError(f"{len(grads)} gradients for {len(live)} leaves of {len(entries)} parameters")
        taken = dict(zip((entry.param for entry in (live if len(grads) == len(live) else entries)), grads))
        return [self._compact(entry, taken.get(entry.param)) for entry in entries]

    @staticmethod
    def _compact(entry: _Entry, grad: Tensor | None) -> Tensor | None:
        if grad is None or entry.leaf is None:
            return None
        if grad.shape != entry.leaf.shape:
            raise PeckerKernelsError(
                f"the gradient of {entry.name!r} has shape {list(grad.shape)}, its leaf {list(entry.leaf.shape)}"
            )
        return grad if entry.lanes is None else entry.lanes.gather(grad).reshape(-1)

    def grads(self) -> list[Tensor | None]:
        """The same of what loss.backward() left."""
        return self.compact([None if leaf is None else leaf.grad for leaf in self.leaves])

    def zero_grad(self) -> None:
        for leaf in self.leaves:
            if leaf is not None:
                leaf.grad = None

    def report(self) -> list[LayerReport]:
        """Every layer with trainable parameters of its own, in the model's order."""
        rows = []
        for name, module in self.model.named_modules():
            entries = [self._entries[p] for p in module._parameters.values() if p is not None]
            known = [entry for entry in entries if entry.name in self.mask.bits]
            if not known:
                continue
            rest = "dense" if any(entry.leaf is not None for entry in known) else "dead"
            mode, by = self._modes.get(module, (rest, "torch"))
            rows.append(report_layer(name, module, mode, by, self.mask, [entry.name for entry in known]))
        return rows

    def undo(self) -> None:
        """Give the layers their own forward and the parameters their requires_grad back; a second time does nothing."""
        if not self.active:
            return
        self.active = False
        for module, forward in self._swapped:
            if vars(module).get("forward") is forward:
                del module.forward
        while self._hooks:
            self._hooks.pop().remove()
        self._freeze(False)
        _ACTIVE.discard(self.model)

    def __enter__(self) -> SparseBackward:
        if not self.active:
            self._apply()
        self._depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()
