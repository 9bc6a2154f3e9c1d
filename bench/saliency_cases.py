"""Accumulating scores, contrasting them and choosing a mask from them, each with its gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pecker_kernels as pk
import torch
from flat_cases import KTHVALUE_AT_MOST, check_native
from harness import SLOW_ROUNDS, Case, Contender
from kernel_gates import check_accuracy
from masks import clustered_scores
from pecker_kernels import reference
from pecker_kernels.spec import SPECS
from shapes import Shapes, iteration_flops, network, size, small
from torch import Tensor

ADD = {
    "sum": lambda score, g: score.add_(g),
    "abs": lambda score, g: score.add_(g.abs()),
    "square": lambda score, g: score.add_(g * g),
}


@dataclass(frozen=True)
class SaliencyCase:
    """operation "accumulate": one call, with `last` the one that may count the first histogram as well. "contrast".
    "select": from scores to mask; with `last` the scores come from a call that may have counted already."""

    operation: str
    network: str
    reduction: str = "abs"
    structure: str = "element"
    density: float = 0.1
    last: bool = False

    def __str__(self) -> str:
        detail = {"accumulate": self.reduction, "contrast": "", "select": f"{self.structure}-{self.density:g}"}
        parts = (self.operation, self.network, detail[self.operation], "last" if self.last else "")
        return "-".join(filter(None, parts))


def saliency_cases(networks: tuple[str, ...], selected: str) -> list[SaliencyCase]:
    """selected: the tensor list that masks are chosen for."""
    cases = []
    for name in networks:
        cases += [SaliencyCase("accumulate", name, reduction) for reduction in ADD]
        cases += [SaliencyCase("accumulate", name, "abs", last=True), SaliencyCase("contrast", name)]
    cases += [
        SaliencyCase("select", selected, density=d, last=last) for d in (0.5, 0.1, 0.01) for last in (False, True)
    ]
    return [*cases, *[SaliencyCase("select", selected, structure=s) for s in ("row", "tile")]]


class Scored:
    """Parameters with gradients that cluster, and scores of them."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        self.named = []
        for name, g in clustered_scores(shapes).items():
            p = torch.nn.Parameter(torch.empty(g.shape, device=device))
            sign = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)).sub_(0.5).sign_()
            p.grad = (g * sign).to(device)
            self.named.append((name, p))
        self.grads = [p.grad for _, p in self.named]

    def scores(self, reduction: str, last: bool = False) -> pk.SaliencyScores:
        scores = pk.SaliencyScores(self.named, reduction)
        scores.accumulate(last=last)
        return scores


class Fresh:
    """Scores made anew before each run, because a run uses them up."""

    def __init__(self, make: Any) -> None:
        self.make = make
        self.value: Any = None

    def prepare(self) -> None:
        self.value = None  # before the new one is made, so that memory holds one
        self.value = self.make()

    def read(self) -> list[Tensor]:
        return [score for _, score in self.value.named_scores()]


def accumulate_contenders(case: SaliencyCase, scored: Scored) -> list[Contender]:
    loop = [torch.zeros_like(g) for g in scored.grads]
    foreach = [torch.zeros_like(g) for g in scored.grads]
    add = ADD[case.reduction]
    fresh = Fresh(lambda: scored.scores(case.reduction))

    def by_tensor() -> list[Tensor]:
        for score, g in zip(loop, scored.grads):
            add(score, g)
        return loop

    def by_foreach() -> list[Tensor]:
        if case.reduction == "square":
            torch._foreach_addcmul_(foreach, scored.grads, scored.grads)
        else:
            torch._foreach_add_(foreach, scored.grads if case.reduction == "sum" else torch._foreach_abs(scored.grads))
        return foreach

    # Scores that were told "last" may refuse another call, so that case starts afresh; the others go on.
    prepare = fresh.prepare if case.last else (lambda: fresh.value or fresh.prepare())
    return [
        Contender("ours", lambda: fresh.value.accumulate(last=case.last), prepare, fresh.read),
        Contender("tensor by tensor", by_tensor),
        Contender("foreach", by_foreach),
    ]


def contrast_contenders(case: SaliencyCase, scored: Scored, floor: float = 1e-3) -> list[Contender]:
    retain = pk.SaliencyScores(scored.named, "square")
    retain.accumulate()
    squares = [score for _, score in retain.named_scores()]
    fresh = Fresh(lambda: scored.scores("abs"))
    total = sum(g.numel() for g in scored.grads)

    def by_foreach() -> list[Tensor]:
        rms = torch._foreach_sqrt(squares)
        mean = sum(r.sum(dtype=torch.float64) for r in rms) / total
        torch._foreach_add_(rms, float(floor * mean))
        return list(torch._foreach_div(fresh.read(), rms))

    return [
        Contender("ours", lambda: fresh.value.contrast_(retain, floor), fresh.prepare, fresh.read),
        Contender("foreach", by_foreach, fresh.prepare),
    ]


def select_contenders(case: SaliencyCase, scored: Scored) -> list[Contender]:
    """Peers concatenate, threshold and compare: they keep every tie and do not pack."""
    fresh = Fresh(lambda: scored.scores("abs", case.last))

    def by(threshold: Any) -> Any:
        def run() -> list[Tensor]:
            scores = fresh.read()
            flat = torch.cat([score.reshape(-1) for score in scores])
            cut = threshold(flat, max(1, round(flat.numel() * case.density)))
            return [score >= cut for score in scores]

        return run

    def ours() -> pk.SaliencyMask:
        return pk.SaliencyMask.from_scores(fresh.value, case.density, structure=case.structure)

    contenders = [Contender("ours", ours, fresh.prepare)]
    if case.structure == "element":
        contenders.append(
            Contender("torch.topk", by(lambda flat, k: flat.topk(k, sorted=False).values.min()), fresh.prepare)
        )
        cuda = scored.grads[0].is_cuda
        if not cuda or sum(g.numel() for g in scored.grads) <= KTHVALUE_AT_MOST:
            kth = by(lambda flat, k: flat.kthvalue(flat.numel() - k + 1).values)
            contenders.append(Contender("torch.kthvalue", kth, fresh.prepare))
    return contenders


CONTENDERS = {"accumulate": accumulate_contenders, "contrast": contrast_contenders, "select": select_contenders}


def truth(case: SaliencyCase, scored: Scored, dtype: torch.dtype) -> list[Tensor]:
    """What one run leaves, in this dtype: scores after two calls (one if no call went before), or the mask."""
    grads = [g.to(dtype) for g in scored.grads]
    once = [ADD[case.reduction](torch.zeros_like(g), g) for g in grads]
    if case.operation == "accumulate":
        twice = [ADD[case.reduction](score, g) for score, g in zip(once, grads)]
        return [score.abs() for score in twice]
    if case.operation == "contrast":
        rms = [(g * g).sqrt() for g in grads]
        mean = torch.cat([r.reshape(-1) for r in rms]).mean()
        return [score / (r + 1e-3 * mean) for score, r in zip(once, rms)]
    k = round(sum(g.numel() for g in grads) * case.density)
    scores = [g.abs() for g in scored.grads]
    if case.structure == "element":
        return reference.keep_top_k(scores, k)
    return reference.keep_best_blocks(scores, k, case.structure, (128, 128))


def gate(case: SaliencyCase, device: str) -> None:
    check_native(device)
    scored = Scored(small(network(case.network)), device)
    expected = truth(case, scored, torch.float64)
    for contender in CONTENDERS[case.operation](case, scored):
        found = contender.outcome()
        if case.operation == "select":
            masks = [found.bool(name) for name, _ in scored.named] if isinstance(found, pk.SaliencyMask) else found
            wrong = sum(int((a != b).sum()) for a, b in zip(masks, expected))
            assert not wrong, f"{contender.name} chooses {wrong} other weights"
            continue
        if case.operation == "accumulate" and contender.name != "ours":
            found = [score.abs() for score in contender.run()]  # peers start from zero, ours from one call
        for value, same, exact in zip(found, truth(case, scored, torch.float32), expected):
            check_accuracy(value, same, exact)


@lru_cache(maxsize=1)
def _scored(name: str, device: str) -> Scored:
    return Scored(network(name), device)


def saliency_case(case: SaliencyCase, device: str = "cpu") -> Case:
    shapes = network(case.network)
    n = size(shapes)
    ours, *peers = CONTENDERS[case.operation](case, _scored(case.network, device))
    name = {"accumulate": "accumulate_", "contrast": "contrast_", "select": "keep_top_k"}[case.operation]
    spec = SPECS[name]
    # Only accumulating happens in every iteration (of the saliency pass); the rest once a run.
    share = iteration_flops(case.network) if case.operation == "accumulate" else None
    return Case(
        ours, peers, lambda: gate(case, device), spec.bytes_moved(n, case.density), spec.flops(n, case.density), device,
        share, SLOW_ROUNDS, {**case.__dict__, "weights": n},
    )  # fmt: skip
