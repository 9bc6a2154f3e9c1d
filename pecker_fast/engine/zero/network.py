"""One network on DeepSpeed ZeRO: its partition, its optimizer, its gradients, its weights one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pecker_kernels import MaskedAdam, Piece, SaliencyMask, Shards
from pecker_kernels.mask.shards import PARTITION
from torch import Tensor, nn

from pecker_fast.engine.zero.settings import initialize
from pecker_fast.networks import Denoiser

Gradient = tuple[str, Tensor]  # what it is called, its values


class Sharded:
    """A trainable network as a DeepSpeed engine.

    After DeepSpeed has partitioned the weights this class knows which of them lie here (`shards`), and the vector they lie in
    (`partition`, float32 [length], on the CPU with offload). The optimizers over that vector are ours; DeepSpeed reduces
    gradients into it and gathers weights from it.
    """

    def __init__(self, denoiser: Denoiser, settings: dict[str, Any]) -> None:
        trainable = [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]
        self.stage = int(settings["zero_optimization"]["stage"])
        shapes = {name: tuple(p.shape) for name, p in trainable}
        placeholder = MaskedAdam([p for _, p in trainable], lr=0.0, betas=(0.0, 0.999))
        self.engine: Any = initialize(model=denoiser.unet, optimizer=placeholder, config=settings)
        self.optimizer: Any = self.engine.optimizer  # DeepSpeed's, which holds ours
        # it would cut fragments of moments, which compact ones have not
        self.optimizer._hp_optimizer_states_linked = True
        self.denoiser = denoiser.with_network(self.engine.module)
        self.parameters: dict[str, nn.Parameter] = dict(trainable)
        pieces = self._stage3_pieces() if self.stage == 3 else self._stage12_pieces()
        self.shards = Shards(shapes, pieces, self.partition.numel())
        self._partial: tuple[SaliencyMask, list[str]] | None = None

    @property
    def partition(self) -> Tensor:
        """float32 [length], this rank's weights."""
        of_stage = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        (partition,) = getattr(self.optimizer, of_stage)
        return partition

    @property
    def named_partition(self) -> list[tuple[str, Any]]:
        return [(PARTITION, self.partition)]

    def _stage12_pieces(self) -> list[Piece]:
        """One stretch of all weights, end to end; behind the last there is padding."""
        length = self.partition.numel()
        low = length * torch.distributed.get_rank()
        pieces, first = [], 0
        for name, p in self.parameters.items():
            start, stop = max(low, first), min(low + length, first + p.numel())
            if start < stop:
                pieces.append(Piece(name, start - first, stop - first, start - low))
            first += p.numel()
        return pieces

    def _stage3_pieces(self) -> list[Piece]:
        """A slice of every tensor, the last one padded."""
        rank, pieces, offset = torch.distributed.get_rank(), [], 0
        for name, p in self.parameters.items():
            size, n = p.ds_tensor.numel(), p.ds_numel  # type: ignore[attr-defined]
            start, stop = min(n, rank * size), min(n, (rank + 1) * size)
            if start < stop:
                pieces.append(Piece(name, start, stop, offset))
            offset += size
        return pieces

    # -- the step ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def one_reduction(self, wanted: bool) -> Iterator[None]:
        """Inside, gradients of several backward passes are added up here, and reduced once at the end."""
        with self.engine.coalesce_grad_reduction() if wanted else contextlib.nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def _masked_by(self, mask: SaliencyMask) -> list[str]:
        """Tensors that a mask keeps in part. Counting waits for the device, so it is done once for a mask, not in every pass."""
        if self._partial is None or self._partial[0] is not mask:
            self._partial = mask, [n for n in self.parameters if mask.count_of(n) < mask.shapes[n].numel()]
        return self._partial[1]

    @contextlib.contextmanager
    def masked_gradients(self, mask: SaliencyMask | None) -> Iterator[None]:
        """Inside, gradients of weights become g ⊙ m before they meet anything else."""
        hooks = []
        if mask is not None:
            hooks = [self.parameters[name].register_hook(_masking(mask, name)) for name in self._masked_by(mask)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(self) -> list[Gradient]:
        """The reduced gradients that lie here, before a step."""
        optimizer = self.optimizer
        if self.partition.grad is not None:
            return self._by_piece(self.partition.grad)
        averaged = optimizer.averaged_gradients
        found = averaged.get(0) if isinstance(averaged, dict) else averaged[0]
        names = [piece.name for piece in self.shards.pieces] + ["padding"] * len(found or [])
        return [(name, g) for name, g in zip(names, found or [])]

    def _by_piece(self, vector: Tensor) -> list[Gradient]:
        return [(piece.name, self.shards.view(vector, piece)) for piece in self.shards.pieces]

    def step(self, optimizer: MaskedAdam) -> None:
        """One step of an optimizer of this partition on the reduced gradients; the others get the new weights."""
        partition = self.partition
        self.optimizer.optimizer = optimizer
        self.engine.step()
        optimizer.param_groups[0]["params"] = [partition]  # stage 3 leaves the group empty
        assert not self.optimizer.overflow, "DeepSpeed has left out a step on gradients that were found finite"

    # -- the weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self) -> None:
        """Let the network follow its partition, on all ranks."""
        if self.stage != 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        self.optimizer._reassign_or_swap_out_partitioned_parameters(0)
        if kept := self.optimizer.persistent_parameters:
            kept[0].all_gather(kept)

    def collect(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) one after the other, of any vector laid out as the partition. Takes all ranks."""
        for name in self.shards.shapes:
            yield name, self.shards.gather(vector, name)

    def whole(self, is_first: bool, cast: Callable[[str, Tensor], Tensor]) -> Denoiser | None:
        """A network of the partition's weights on rank 0, tensor by tensor; None on the others. Takes all ranks.

        cast: (name, float32 weights) -> what the copy holds.
        """
        tensors = {}
        for name, tensor in self.collect(self.partition.detach()):
            value = cast(name, tensor)
            if is_first:
                tensors[name] = value.to(self.denoiser.device)
        return _copy_with(self.denoiser, tensors) if is_first else None


def gathered(parameters: list[nn.Parameter], stage: int) -> contextlib.AbstractContextManager[object]:
    """Inside, these parameters are whole on every rank, to be read. Takes all ranks."""
    if stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # type: ignore[no-any-return]


def _copy_with(denoiser: Denoiser, tensors: dict[str, Tensor]) -> Denoiser:
    """A frozen network like this one, with these weights."""
    unet: Any = denoiser.unet
    copy = type(unet).from_config(unet.config).to(denoiser.device)
    for name, p in copy.named_parameters():
        p.data = tensors[name]
    return denoiser.with_network(copy).freeze()


def _masking(mask: SaliencyMask, name: str) -> Callable[[Tensor], Tensor]:
    def masked(grad: Tensor) -> Tensor:
        product = grad.clone(memory_format=torch.contiguous_format)
        mask.apply_({name: product})
        return product

    return masked
