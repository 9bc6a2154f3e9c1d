"""Pure-torch truth of every operation. Slow and plain on purpose: tests, benchmarks and faster kernels are judged
against it.

Bit order: weight i of a tensor (flat, row-major) is bit `i & 7` of byte `i >> 3`, least significant first; padding bits
are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_bits(keep: Tensor) -> Tensor:
    """bool or uint8 [any shape] (non-zero = one) -> uint8 [ceil(n / 8)]."""
    flat = keep.reshape(-1) != 0
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(-1, 8).to(torch.uint8) * _bit_values(flat.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    return (bits.view(-1, 1) & _bit_values(bits.device)).ne(0).view(-1)[:n]


def popcount(bits: Tensor) -> int:
    """Number of ones in uint8 [any shape]."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum(dtype=torch.int64))


def apply_(tensor: Tensor, bits: Tensor) -> Tensor:
    """t ⊙ m in place, any strides: masked-out elements become exactly +0, NaN included; the others keep their bits."""
    return tensor.masked_fill_(~unpack_bits(bits, tensor.numel()).view(tensor.shape), 0)


def kth_largest(tensors: Sequence[Tensor], k: int) -> float:
    """The k-th largest value (k = 1 is the maximum) over all tensors, by sorting."""
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    return float(flat.sort(descending=True).values[k - 1])


def keep_top_k(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """bool tensors that keep exactly the k largest values; equal values are decided by the lowest flat index over all
    tensors."""
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.sort(descending=True, stable=True).indices[:k]] = True
    return [part.view(t.shape) for part, t in zip(keep.split([t.numel() for t in tensors]), tensors)]


def block_boxes(shape: Sequence[int], structure: str, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """The blocks of one tensor in order, as slices of its view [shape[0], rest].

    "row": one slice along the first dimension, a single weight for a tensor with fewer than two dimensions;
    "tile": tile[0] x tile[1],
    row-major, edges ragged; "tensor": the whole.
    """
    rows = int(shape[0]) if len(shape) else 1
    columns = int(torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1
    height, width = {"row": (1, columns), "tile": tile, "tensor": (rows, columns)}[structure]
    if rows * columns == 0:
        return
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def keep_best_blocks(tensors: Sequence[Tensor], k: int, structure: str, tile: tuple[int, int]) -> list[Tensor]:
    """bool tensors: best blocks by mean until k weights are covered, the last block whole; equal means keep the earlier
    block."""
    views = [t.double().reshape(t.shape[0] if t.dim() else 1, -1) if t.numel() else t for t in tensors]
    boxes = [(i, box) for i, t in enumerate(tensors) for box in block_boxes(t.shape, structure, tile)]
    means = [float(views[i][box].mean()) for i, box in boxes]
    keep = [torch.zeros(v.shape, dtype=torch.bool, device=v.device) for v in views]
    covered = 0
    for at in sorted(range(len(boxes)), key=lambda at: -means[at]):
        if covered >= k:
            break
        i, box = boxes[at]
        keep[i][box] = True
        covered += views[i][box].numel()
    return [m.view(t.shape) for m, t in zip(keep, tensors)]


def accumulate_(score: Tensor, grad: Tensor, reduction: str) -> Tensor:
    """score += g | |g| | g² in float32."""
    g = grad.float()
    return score.add_({"sum": g, "abs": g.abs(), "square": g * g}[reduction])


def contrast_(score: Tensor, other_square_sum: Tensor, count: int, floor_value: float) -> Tensor:
    """score / (sqrt(other_square_sum / count) + floor_value), in place."""
    return score.div_((other_square_sum / count).sqrt_().add_(floor_value))


def clip_norm_factor(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), 0-dim, with the L2 norm over all grads."""
    norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_(grads: Sequence[Tensor], clip_value: float | None, clip_norm: float | None) -> None:
    """Elementwise clamp to ±clip_value, then one common factor so that the L2 norm over all grads is at most clip_norm,
    in place.

    The factor is min(1, clip_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_.
    """
    for g in grads:
        if clip_value is not None:
            g.clamp_(-clip_value, clip_value)
    if clip_norm is not None and grads:
        factor = clip_norm_factor(grads, clip_norm)
        for g in grads:
            g.mul_(factor)


def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
) -> None:
    """One Adam step (Kingma & Ba, 1412.6980, Algorithm 1) on tensors of one dtype, in place; `step` counts from 1.

    m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p - lr · (m / (1-β₁ᵗ)) / (√v / √(1-β₂ᵗ) + eps)

    Weight decay: g ← g + wd·p (L2), or p ← p·(1 - lr·wd) first (decoupled). exp_avg None needs β₁ = 0, where m = g.
    """
    if weight_decay:
        if decoupled_weight_decay:
            param.mul_(1 - lr * weight_decay)
        else:
            grad = grad.add(param, alpha=weight_decay)
    if exp_avg is None:
        exp_avg = grad
    else:
        exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def live_weight_grad(grad_out: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """[k, rows], [k, columns], bool [rows, columns] -> [ones]: what a linear layer's weight gradient Σₖ grad_out ⊗ x holds
    at the weights kept, in row-major order."""
    return (grad_out.t() @ x)[keep]


def strip_weight_grad(grad_out: Tensor, x: Tensor, strips: Sequence[tuple[slice | Tensor, slice | Tensor]]) -> Tensor:
    """The same for weights kept in strips, (rows, columns) each, computing no others: [Σ rows · columns], strip by strip,
    each row-major."""
    parts = [(grad_out[:, rows].t() @ x[:, columns]).reshape(-1) for rows, columns in strips]
    return torch.cat(parts) if parts else grad_out.new_empty(0)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, C, …], mean [N, groups], rstd [N, groups]): y = u · σ(u), or u itself, with u = (x − mean) · rstd · weight + bias.

    Statistics are float32 or wider.
    """
    n, channels = x.shape[:2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = x.numel() // (n * channels) if x.numel() else 0
    u, mean, rstd = torch.native_group_norm(
        x.to(wide).contiguous(), weight.to(wide), bias.to(wide), n, channels, size, groups, eps
    )
    y = torch.nn.functional.silu(u) if silu else u
    return torch.empty_like(x).copy_(y), mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias, in their dtypes; None where not needed."""
    n, channels = x.shape[:2]
    per_group, wide = channels // groups, mean.dtype
    shape = (n, channels, *(1 for _ in x.shape[2:]))
    means, rstds = (t.repeat_interleave(per_group, 1).view(shape) for t in (mean, rstd))
    weights, biases = (t.to(wide).view(1, *shape[1:]) for t in (weight, bias))
    xhat = (x.to(wide) - means) * rstds
    du = grad.to(wide)
    if silu:
        u = xhat * weights + biases
        s = u.sigmoid()
        du = du * s * (1 + u * (1 - s))
    inner = tuple(range(2, x.dim()))
    by_bias, by_weight = (t.sum(inner) if inner else t for t in (du, du * xhat))  # [N, C]
    grad_x = None
    if needed[0]:
        size = max(per_group * (x.numel() // max(n * channels, 1)), 1)
        of_mean, of_scale = (
            ((t * weight.to(wide)).view(n, groups, per_group).sum(2) / size).repeat_interleave(per_group, 1).view(shape)
            for t in (by_bias, by_weight)
        )
        grad_x = torch.empty_like(x).copy_(rstds * (du * weights - of_mean - xhat * of_scale))
    return (
        grad_x,
        by_weight.sum(0).to(weight.dtype) if needed[1] else None,
        by_bias.sum(0).to(bias.dtype) if needed[2] else None,
    )


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer finaliser ("lowbias32", C. Wellons) on int64 tensors holding values below 2**32."""
    word = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
    x = ((x ^ (x >> 15)) * 0x846CA68B) & word
    return x ^ (x >> 16)


def random_bits16(index: Tensor, seed: int, step: Tensor | int) -> Tensor:
    """16 random bits [int64, 0..65535] per weight, a pure function of (seed, step, flat index int64 over the whole
    model)."""
    word = 0xFFFFFFFF
    key = _mix(torch.as_tensor(step, device=index.device).to(torch.int64) & word)
    key = _mix((key ^ (seed & word)) & word) ^ ((seed >> 32) & word)
    return _mix(_mix((index & word) ^ key) ^ ((index >> 32) & word)) >> 16


def stochastic_round_bf16(value: Tensor, bits16: Tensor) -> Tensor:
    """float32 -> bfloat16, up with the probability of the remainder; inf and NaN pass through."""
    raw = value.view(torch.int32)
    rounded = ((raw.to(torch.int64) + bits16) & -65536).to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
