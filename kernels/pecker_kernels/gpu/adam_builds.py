"""The builds of the Adam kernels that are compiled for sm_80 and sm_90 without a GPU: one per kind of step."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from .adam import adam_kernel
from .adam_lanes import BITMAP, BLOCK, INDEX, WARPS, WHOLE
from .adam_prepare import prepare_kernel
from .gradstats import gradstats_kernel
from .registry import KernelBuild

_TABLES = {"table": "*i64", "chunks": "*i64"}
_NUMBERS = ("weight1", "weight2", "beta2", "eps", "weight_decay", "clip_value", "ema_weight")
_ADAM = {**_TABLES, "scalars": "*fp32", **dict.fromkeys(_NUMBERS, "fp32")}
_STATS = {**_TABLES, "partial": "*fp32", "stride": "i32", "grad_scale": "*fp32", "clip_value": "fp32"}
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(
        ("COMPACT", "SELECT", "COMPACT_GRADS", "SCALED", "CLAMPED", "CLIPPED", "L2", "DECOUPLED", "MASTER", "EMA"),
        False,
    ),
    "LANES": WHOLE.value,
    "PARAM": tl.float32,
    "GRAD": tl.float32,
    "MORE": None,
    "EXP_AVG": True,
    "ALIGNED": True,
    "BLOCK": BLOCK,
}
_BITMAP = {"LANES": BITMAP.value, "COMPACT": True, "ALIGNED": False}
_INDEX = {**_BITMAP, "LANES": INDEX.value}
_BF16 = {"PARAM": tl.uint16, "GRAD": tl.uint16}
_EVERYTHING = {"SCALED": True, "CLAMPED": True, "CLIPPED": True, "L2": True, "EMA": True}

# name: (constants that differ from the plain dense step, widest load and store in bits)
_VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "dense": ({}, 128, 128),
    "dense_beta1_zero": ({"EXP_AVG": False}, 128, 128),
    "dense_unaligned": ({"ALIGNED": False}, 32, 32),
    "dense_everything": (_EVERYTHING, 128, 128),
    "dense_bf16_stochastic": (_BF16, 128, 128),
    "dense_bf16_master": ({**_BF16, "MASTER": True}, 128, 128),
    "dense_fp16_master": ({"PARAM": tl.float16, "GRAD": tl.float16, "MASTER": True}, 128, 128),
    "differentiated": ({"MORE": tl.float32, "SELECT": True}, 128, 128),
    "differentiated_compact": ({"MORE": tl.float32, "SELECT": True, "COMPACT_GRADS": True}, 128, 128),
    "differentiated_beta1_zero": ({"MORE": tl.float32, "SELECT": True, "EXP_AVG": False}, 128, 128),
    "bitmap": (_BITMAP, 32, 32),
    "bitmap_beta1_zero": ({**_BITMAP, "EXP_AVG": False}, 32, 32),
    "bitmap_dense_state": ({**_BITMAP, "COMPACT": False}, 32, 32),
    "bitmap_everything": ({**_BITMAP, **_EVERYTHING}, 32, 32),
    "bitmap_bf16_stochastic": ({**_BITMAP, **_BF16, "EXP_AVG": False}, 32, 32),
    "bitmap_compact_grad": ({**_BITMAP, "COMPACT_GRADS": True}, 32, 32),
    "bitmap_compact_grad_dense_state": ({**_BITMAP, "COMPACT_GRADS": True, "COMPACT": False}, 32, 32),
    "bitmap_compact_grad_everything": ({**_BITMAP, **_EVERYTHING, "COMPACT_GRADS": True}, 32, 32),
    "index": (_INDEX, 32, 32),
    "index_beta1_zero": ({**_INDEX, "EXP_AVG": False}, 32, 32),
    "index_everything": ({**_INDEX, **_EVERYTHING}, 32, 32),
    "index_bf16_stochastic": ({**_INDEX, **_BF16, "EXP_AVG": False}, 32, 32),
    "index_compact_grad": ({**_INDEX, "COMPACT_GRADS": True}, 32, 32),
    "index_compact_grad_bf16": ({**_INDEX, **_BF16, "COMPACT_GRADS": True, "EXP_AVG": False}, 32, 32),
}
_STATS_ONLY = ("LANES", "GRAD", "MORE", "SELECT", "COMPACT_GRADS", "SCALED", "CLAMPED", "ALIGNED", "BLOCK")


def _adam(name: str, constants: dict[str, Any], load_bits: int, store_bits: int) -> KernelBuild:
    return KernelBuild(f"adam_{name}", adam_kernel, _ADAM, {**_PLAIN, **constants}, WARPS, load_bits, store_bits)


def _stats(name: str) -> KernelBuild:
    constants, load_bits, _ = _VARIANTS[name]
    chosen = {key: {**_PLAIN, **constants}[key] for key in _STATS_ONLY}
    return KernelBuild(f"gradstats_{name}", gradstats_kernel, _STATS, chosen, WARPS, load_bits)


def _prepare(name: str, absent: tuple[str, ...], log_beta1: float | None) -> KernelBuild:
    tensors = {"lr_tensor": "*fp32", "found_inf": "*fp32", "grad_scale": "*fp32", "square_sum": "*fp64"}
    numbers = {"lr": "fp32", "lr_rest": "fp32", "weight_decay": "fp32", "clip_norm": "fp32", "seed": "i64"}
    present = {key: kind for key, kind in tensors.items() if key not in absent}
    constants = {**dict.fromkeys(absent), "LOG_BETA1": log_beta1, "LOG_BETA2": -0.001}
    return KernelBuild(
        f"adam_prepare_{name}",
        prepare_kernel,
        {"table": "*i64", "scalars": "*fp32", **present, **numbers},
        constants,
        1,
    )


COMPILE = [
    *(_adam(name, *build) for name, build in _VARIANTS.items()),
    *map(_stats, ("dense", "dense_everything", "differentiated", "bitmap", "index")),
    *map(_stats, ("differentiated_compact", "bitmap_compact_grad", "index_compact_grad")),
    _prepare("plain", ("lr_tensor", "found_inf", "grad_scale", "square_sum"), None),
    _prepare("everything", (), -0.1),
]
