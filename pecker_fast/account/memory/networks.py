"""Networks without memory: built from their configs, they know shapes and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pecker_fast.errors import ModelError
from pecker_fast.networks import Denoiser, Schedule, fuse_norms

TIMESTEPS = 1000
TIME_IDS = 6  # SDXL: original size, crop, target size


def build(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32, recomputed_in: Callable[[], Kernels] | None = None,
    fused: bool = False,
) -> nn.Module:  # fmt: skip
    """The diffusers network of a config, inside whatever mode or device is active. Raises ModelError if there is none.

    recomputed_in: gradient checkpointing, and what to run the forward pass in when the backward pass repeats it. fused: its norms.
    """
    import diffusers

    kind = str(
        config.get("_class_name") or ("UNet2DConditionModel" if "cross_attention_dim" in config else "UNet2DModel")
    )
    if kind not in ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"):
        raise ModelError(
            f"memory: no prediction for a {kind[:80]}; it knows UNet2DModel, UNet2DConditionModel, AutoencoderKL"
        )
    with _default_dtype(dtype), _no_initial_values():
        network = getattr(diffusers, kind).from_config({k: v for k, v in config.items() if not k.startswith("_")})
    if recomputed_in is not None:
        again = recomputed_in  # a backward pass leaves the modes it is called in

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), again()

        network.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        )
    return fuse_norms(network) if fused else network


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _no_initial_values() -> Iterator[None]:
    """Most of the time of building goes into values that nobody reads."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding, nn.GroupNorm, nn.LayerNorm)
    before = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for kind, method in zip(kinds, before):
            kind.reset_parameters = method


def blank_schedule() -> Schedule:
    return Schedule(torch.empty(TIMESTEPS), torch.empty(TIMESTEPS), "epsilon", {})


class Blank(Denoiser):
    """A class-conditional or text-conditional network; what it is told is of the right shape and no more. tokens: length of
    a text embedding."""

    def __init__(self, make: Callable[[], nn.Module], schedule: Schedule, channels_last: bool, tokens: int) -> None:
        super().__init__(make(), schedule, 0, channels_last)
        self.make, self.tokens = make, tokens

    def clone(self) -> Blank:
        return Blank(self.make, self.schedule, self.channels_last, self.tokens)

    def _forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        if not hasattr(self.config, "cross_attention_dim"):
            return super()._forward(x_t.to(dtype), t, c)
        if self.channels_last:
            x_t = x_t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        n, width = x_t.shape[0], self.config.cross_attention_dim
        text = torch.empty(n, self.tokens, width if isinstance(width, int) else width[0], dtype=dtype)
        if self.free is not None:
            text = text + self.free.flatten()[:1].to(dtype)  # as large as the prompts whose tokens they take
        added = None
        if self.config.addition_embed_type == "text_time":
            pooled = self.config.projection_class_embeddings_input_dim - TIME_IDS * self.config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(n, pooled, dtype=dtype), "time_ids": torch.empty(n, TIME_IDS)}
        return self.unet(
            x_t.to(dtype), t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip


class Kernels(TorchFunctionMode):
    """Lets operations keep what they keep on the real device.

    Fused attention keeps q, k, v, its result and one number a row, and never the matrix of all pairs; without a device torch
    would take the unfused one. Under autocast a GPU computes norms in float32, the CPU does not (fp32_norms).
    """

    def __init__(self, fused: bool, fp32_norms: bool) -> None:
        super().__init__()
        self.fused, self.fp32_norms = fused, fp32_norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.fused and func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        norm = func in (functional.group_norm, functional.layer_norm)
        if norm and self.fp32_norms and torch.is_autocast_enabled("cpu"):
            x, *rest = args
            rest = [a.float() if isinstance(a, Tensor) else a for a in rest]
            kwargs = {key: a.float() if isinstance(a, Tensor) else a for key, a in kwargs.items()}
            return func(x.float(), *rest, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
