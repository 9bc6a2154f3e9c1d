"""Thresholds and bit operations over flat tensors, each with its gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pecker_kernels as pk
import torch
from harness import SLOW_ROUNDS, Case, Contender
from masks import clustered_scores
from pecker_kernels import native as cpu
from pecker_kernels import reference
from pecker_kernels.mask import bits as bitmask
from pecker_kernels.spec import SPECS
from shapes import FLAT, length
from torch import Tensor

GATE = 10_007
KTHVALUE_AT_MOST = 1 << 27  # on a GPU torch.kthvalue of a billion values takes minutes
SORT_AT_MOST = 1 << 31  # and topk and sort refuse, or have been wrong, above


def check_native(device: str) -> None:
    """ "auto" would fall back to torch without a word."""
    assert device != "cpu" or cpu.available(), "the C++ library is not installed: this would time torch itself"


@dataclass(frozen=True)
class ThresholdCase:
    """The exact k-th largest of n scores, k = round(n · density)."""

    values: str  # "half-normal" | "clustered" | "equal"
    density: float
    n: int = FLAT

    def __str__(self) -> str:
        return f"{self.values}-{self.density:g}" + (f"-{self.n}" if self.n != FLAT else "")

    def scores(self, n: int, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        if self.values == "equal":  # dead layers: every value lands in one bin
            return torch.zeros(n, device=device)
        if self.values == "clustered":
            return clustered_scores((("s", (-(-n // 1024), 1024)),))["s"].view(-1)[:n].to(device)
        return torch.randn(n, generator=generator, device=device).abs_()


def threshold_cases(n: int = FLAT) -> list[ThresholdCase]:
    spread = [ThresholdCase("half-normal", d, n) for d in (0.5, 0.1, 0.01)]
    return [*spread, ThresholdCase("clustered", 0.1, n), ThresholdCase("equal", 0.1, n)]


def threshold_contenders(scores: Tensor, k: int) -> list[Contender]:
    """Ours first. Every run ends with the number on the host, as ours does."""
    n = scores.numel()
    contenders = [Contender("ours", lambda: pk.kth_largest([scores], k))]
    if scores.device.type == "cpu" or n <= KTHVALUE_AT_MOST:
        contenders.append(Contender("torch.kthvalue", lambda: scores.kthvalue(n - k + 1).values.item()))
    if n < SORT_AT_MOST:
        contenders.append(Contender("torch.topk", lambda: scores.topk(k, sorted=False).values.min().item()))
        contenders.append(Contender("torch.sort", lambda: scores.sort(descending=True).values[k - 1].item()))
    return contenders


def gate_threshold(case: ThresholdCase, device: str) -> None:
    check_native(device)
    scores = case.scores(GATE, device)
    k = max(1, round(GATE * case.density))
    truth = reference.kth_largest([scores], k)
    for contender in threshold_contenders(scores, k):
        found = contender.outcome()
        assert found == truth, f"{contender.name} finds {found}, the threshold is {truth}"


def threshold_case(case: ThresholdCase, device: str = "cpu") -> Case:
    n = length(case.n)
    scores = case.scores(n, device)
    ours, *peers = threshold_contenders(scores, max(1, round(n * case.density)))
    return Case(
        ours, peers, lambda: gate_threshold(case, device), SPECS["kth_largest"].bytes_moved(n, case.density), 0, device,
        rounds=SLOW_ROUNDS, info={**case.__dict__, "operation": "kth_largest", "weights": n},
    )  # fmt: skip


@dataclass(frozen=True)
class BitCase:
    operation: str  # "pack" | "unpack" | "popcount" | "apply"
    density: float = 0.1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.operation}-{self.density:g}" + (f"-{self.dtype}" if self.operation == "apply" else "")


BIT_CASES = [
    BitCase("pack"), BitCase("unpack"), BitCase("popcount"),
    *[BitCase("apply", d, t) for t in ("float32", "bfloat16") for d in (0.5, 0.1, 0.01)],
]  # fmt: skip
SPEC_OF = {"pack": "pack_bits", "unpack": "unpack_bits", "popcount": "popcount", "apply": "apply_"}


def bit_contenders(case: BitCase, n: int, device: str) -> tuple[list[Contender], Callable[[Any], Any]]:
    """(contenders, ours first; what a run's result has to look like to be compared)."""
    generator = torch.Generator(device).manual_seed(0)
    keep = torch.rand(n, generator=generator, device=device) < case.density
    bits = reference.pack_bits(keep)
    host = device == "cpu"
    if case.operation == "pack":
        made = [Contender("ours", lambda: bitmask.pack_bits(keep))]
        made += [Contender("numpy.packbits", lambda: np.packbits(keep.numpy(), bitorder="little"))] if host else []
        return made, torch.as_tensor
    if case.operation == "unpack":
        made = [Contender("ours", lambda: bitmask.unpack_bits(bits, n))]
        unpack = Contender("numpy.unpackbits", lambda: np.unpackbits(bits.numpy(), count=n, bitorder="little"))
        return [*made, *([unpack] if host else [])], lambda found: torch.as_tensor(found).bool()
    if case.operation == "popcount":
        made = [
            Contender("ours", lambda: bitmask.popcount(bits)),
            Contender("sum of a bool tensor", lambda: keep.sum().item()),
        ]
        made += [Contender("numpy.bitwise_count", lambda: np.bitwise_count(bits.numpy()).sum())] if host else []
        return made, int
    source = torch.randn(n, generator=generator, device=device).to(getattr(torch, case.dtype))
    target, drop, factor = source.clone(), ~keep, keep.to(source.dtype)

    def restore() -> None:
        target.copy_(source)

    return [
        Contender("ours", lambda: bitmask.apply_(target, bits), restore),
        Contender("mul_ by a mask of the same dtype", lambda: target.mul_(factor), restore),
        Contender("masked_fill_", lambda: target.masked_fill_(drop, 0), restore),
    ], lambda found: found.float() + 0.0  # a product leaves -0.0 where it drops a negative value


def gate_bits(case: BitCase, device: str) -> None:
    check_native(device)
    contenders, plain = bit_contenders(case, GATE, device)
    results = []
    for contender in contenders:
        found = plain(contender.outcome())
        results.append(found.clone() if isinstance(found, Tensor) else found)
    generator = torch.Generator(device).manual_seed(0)
    keep = torch.rand(GATE, generator=generator, device=device) < case.density
    truth: Any = {"pack": reference.pack_bits(keep), "unpack": keep, "popcount": int(keep.sum())}.get(case.operation)
    if case.operation == "apply":
        source = torch.randn(GATE, generator=generator, device=device).to(getattr(torch, case.dtype))
        truth = plain(reference.apply_(source, reference.pack_bits(keep)))
    for contender, found in zip(contenders, results):
        same = torch.equal(found, truth) if isinstance(found, Tensor) else found == truth
        assert same, f"{contender.name} computes another {case.operation}"


def bit_case(case: BitCase, device: str = "cpu") -> Case:
    n = length(FLAT)
    (ours, *peers), _ = bit_contenders(case, n, device)
    moved = SPECS[SPEC_OF[case.operation]].bytes_moved(n, case.density)
    if case.dtype == "bfloat16":
        moved = 4 * n + n / 8  # the formula counts 4-byte values
    return Case(ours, peers, lambda: gate_bits(case, device), moved, 0, device, info={**case.__dict__, "weights": n})
