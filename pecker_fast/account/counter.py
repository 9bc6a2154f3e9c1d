"""One iteration, operation by operation: FLOPs, bytes of operands and live bytes of each part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from pecker_fast.account.live import LiveBytes

OTHER = "other"
aten = torch.ops.aten
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_PRODUCTS = {aten.mm, aten.addmm}  # of linear layers; attention multiplies in batches


@dataclass
class Count:
    """What one part did. weight_gradients: FLOPs by tensor, None where only the shape of the gradient is known."""

    calls: int = 0
    flops: int = 0
    bytes_moved: int = 0
    weight_flops: int = (
        0  # of operations with a weight as operand: what all weight gradients of a forward pass would cost
    )
    peak_tensor_bytes: int = 0
    peak_allocated_bytes: int = 0  # of CUDA's allocator, where `allocator` was asked for
    weight_gradients: dict[str | tuple[int, ...], int] = field(default_factory=dict)


class Counter(TorchDispatchMode):
    """A dispatch mode and a recorder of parts (profile.Recorder). What happens in no part is counted as `other`.

    FLOPs are those of torch's FlopCounterMode, to the last one. Bytes are those of every operand, read or written, views
    apart: an upper bound, since caches and fused loops move less. Neither sees what runs outside torch's dispatcher: the
    optimizer's C++ and Triton kernels, whose costs are formulas (pecker_kernels.cost).
    """

    def __init__(
        self, weights: Mapping[str, Tensor], known: Iterable[Tensor] = (), allocator: torch.device | None = None
    ) -> None:
        super().__init__()
        self.live = LiveBytes(known)
        self.parts: dict[str, Count] = {OTHER: Count(peak_tensor_bytes=self.live.live)}
        self._stack = [OTHER]
        self._weights = {w.untyped_storage()._cdata: name for name, w in weights.items()}
        self._casts: list[Tensor] = []  # kept, so that their addresses stay theirs
        self._allocator = allocator if allocator is not None and allocator.type == "cuda" else None

    @property
    def total_flops(self) -> int:
        return sum(count.flops for count in self.parts.values())

    # -- parts ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        if self._allocator is not None:
            torch.cuda.reset_peak_memory_stats(self._allocator)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._note_allocator()
        return super().__exit__(*error)

    def enter(self, name: str) -> None:
        self._note_allocator()
        self._stack.append(name)
        count = self.parts.setdefault(name, Count())
        count.calls += 1
        count.peak_tensor_bytes = max(count.peak_tensor_bytes, self.live.live)

    def leave(self, name: str) -> None:
        self._note_allocator()
        self._stack.pop()

    def _note_allocator(self) -> None:
        if self._allocator is None:
            return
        count = self.parts[self._stack[-1]]
        count.peak_allocated_bytes = max(count.peak_allocated_bytes, torch.cuda.max_memory_allocated(self._allocator))
        torch.cuda.reset_peak_memory_stats(self._allocator)

    # -- operations ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        packet = func._overloadpacket
        out = func(*args, **kwargs)
        count = self.parts[self._stack[-1]]
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        if packet in flop_registry:
            self._count_flops(count, packet, args, kwargs, inputs, out)
        if not func.is_view and packet not in _ALLOCATIONS:
            count.bytes_moved += _moved(func, args, kwargs, inputs, outputs)
        if packet is aten._to_copy and inputs and self._name(inputs[0]) is not None:  # autocast's copy of a weight
            self._weights[outputs[0].untyped_storage()._cdata] = str(self._name(inputs[0]))
            self._casts.append(outputs[0])
        for tensor in outputs:
            self.live.see(tensor)
        count.peak_tensor_bytes = max(count.peak_tensor_bytes, self.live.live)
        return out

    def _name(self, tensor: Tensor) -> str | None:
        return self._weights.get(tensor.untyped_storage()._cdata)

    def _count_flops(self, count: Count, packet: Any, args: Any, kwargs: Any, inputs: list[Tensor], out: Any) -> None:
        formula = flop_registry[packet]
        flops = formula(*args, **kwargs, out_val=out)
        count.flops += flops
        names = [name for tensor in inputs if (name := self._name(tensor)) is not None]
        if packet is aten.convolution_backward:
            wanted = args[-1]
            alone = formula(*args[:-1], [False, wanted[1], False], **kwargs, out_val=out) if wanted[1] else 0
            if alone:
                key: str | tuple[int, ...] = names[0] if names else tuple(args[2].shape)
                count.weight_gradients[key] = count.weight_gradients.get(key, 0) + alone
        elif names:
            count.weight_flops += flops
        elif packet in _PRODUCTS:  # no weight among the operands of a linear layer: the weight is what it is for
            shape = tuple(out.shape)
            count.weight_gradients[shape] = count.weight_gradients.get(shape, 0) + flops


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others and has no kernel of its own. FlopCounterMode takes those with a kernel apart
    as well (silu_backward): the same FLOPs, but other roundings and more bytes than what runs without it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    own = ("CPU", "CUDA", "CompositeExplicitAutograd")
    return has(func.name(), "CompositeImplicitAutograd") and not any(has(func.name(), key) for key in own)


def _moved(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read and written: every operand once, those changed in place twice."""
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            written += [x for x in tree_iter(value) if isinstance(x, Tensor)]
    mine = {id(x) for x in inputs}
    return sum(map(_extent, (*inputs, *written, *(x for x in outputs if id(x) not in mine))))


def _extent(tensor: Tensor) -> int:
    """Bytes of the values behind a tensor; those an expanded one repeats count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or size == 0)
    return math.prod(sizes) * tensor.element_size()
