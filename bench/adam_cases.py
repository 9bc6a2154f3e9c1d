"""The optimizer steps to time: operation x tensor list x structure x density, each with its gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pecker_kernels as pk
import torch
from adam_contenders import BETAS, CLIP, COARSE, EMA, EPS, LR, OPERATIONS, Builder, Problem, implementation
from harness import Case, Contender, live_lines
from kernel_gates import check_accuracy
from masks import describe, make_mask
from pecker_kernels.spec import SPECS
from shapes import Shapes, iteration_flops, network, size, small

MASKED = ("masked", "compact", "differentiated", "extras")


@dataclass(frozen=True)
class AdamCase:
    """density 1 of "extras": no mask at all. "compact": ours gets the gradients of kept weights alone."""

    operation: str
    network: str
    structure: str = "element"
    density: float = 1.0
    clustered: bool = False

    def __str__(self) -> str:
        mask = f"-{self.structure}{'-clustered' * self.clustered}-{self.density:g}" if self.operation in MASKED else ""
        return f"{self.operation}-{self.network}{mask}"

    @property
    def betas(self) -> tuple[float, float]:
        return (0.0, BETAS[1]) if self.operation == "dense_beta1_0" else BETAS

    def mask(self, shapes: Shapes, device: str) -> pk.SaliencyMask | None:
        if self.operation not in MASKED or (self.operation == "extras" and self.density == 1):
            return None
        return make_mask(shapes, self.structure, self.density, self.clustered, device)


def adam_cases(networks: tuple[str, ...]) -> list[AdamCase]:
    """All cases, ordered by tensor list."""
    cases = []
    for name in networks:
        cases += [AdamCase("dense", name), AdamCase("dense_beta1_0", name)]
        cases += [AdamCase("masked", name, "element", d) for d in (1.0, 0.5, 0.1, 0.01)]
        cases += [AdamCase("masked", name, "element", d, clustered=True) for d in (0.1, 0.01)]
        # One flat tensor has rows of a single weight, and no tiles.
        structures = () if name == "flat" else ("row", "tile")
        cases += [AdamCase("masked", name, s, d) for s in structures for d in (0.5, 0.1, 0.01)]
        cases += [AdamCase("compact", name, s, 0.1) for s in structures[:1]]
        cases += [AdamCase("differentiated", name, "element", d) for d in (0.5, 0.1)]
        cases += [AdamCase("extras", name, "element", d) for d in (1.0, 0.1)]
    return cases


def check(build: Builder, case: AdamCase, device: str, masked: bool = True, steps: int = 3) -> None:
    """The accuracy gate on a small copy: updates from zero, where they are exact, and the average where one is kept.

    masked: whether this contender honours the mask.
    """
    shapes = small(network(case.network))
    problem = Problem(shapes, case.mask(shapes, device), case.betas, device)
    contender = build(problem)
    mask = problem.mask if masked else None
    keep = [torch.ones(s, device=device) if mask is None else mask.bool(n).float() for n, s in shapes]
    twins = {}
    for dtype in (torch.float32, torch.float64):
        weights = [torch.zeros(s, device=device, dtype=dtype, requires_grad=True) for _, s in shapes]
        optimizer = torch.optim.Adam(weights, LR, betas=case.betas, eps=EPS, fused=dtype == torch.float32)
        twins[dtype] = (weights, optimizer)
    generator = torch.Generator(device).manual_seed(1)
    for step in range(steps):
        source = []
        for _, shape in shapes:
            scale = 10 ** (torch.rand(shape, generator=generator, device=device) * 6 - 4)
            source.append(torch.randn(shape, generator=generator, device=device) * scale)
        for p, g in zip(problem.params, source):
            p.data.zero_()
            p.grad.copy_(g)
        problem.__dict__.pop("compact", None)
        contender.run()
        for dtype, (weights, optimizer) in twins.items():
            for i, (w, g, m) in enumerate(zip(weights, source, keep)):
                w.data.zero_()
                if case.operation == "differentiated":
                    w.grad = (g + problem.forget[i] * m).to(dtype)  # rounded once, as the float32 sum is
                else:
                    w.grad = (g * m).to(dtype)
                if case.operation == "extras":
                    w.grad.clamp_(-CLIP, CLIP)
            optimizer.step()
        for (name, _), p, w, truth in zip(shapes, problem.params, twins[torch.float32][0], twins[torch.float64][0]):
            coarse = COARSE.get(contender.name)
            if coarse is not None:
                update = truth.detach() / LR
                error = float(((p.detach() / LR - update) / update.abs().clamp(min=1)).abs().max())
                assert error <= coarse, f"{contender.name}, step {step}, {name}: error {error:.3g}"
                continue
            try:
                check_accuracy(p.detach() / LR, w.detach() / LR, truth.detach() / LR)
            except AssertionError as error:
                raise AssertionError(f"{contender.name}, step {step}, {name}: {error}") from None
    assert bool(torch.cat([p.detach().reshape(-1) for p in problem.params]).any()), f"{contender.name} does nothing"


def check_average(case: AdamCase, device: str) -> None:
    """Ours keeps the average it is timed with."""
    shapes = small(network(case.network))
    problem = Problem(shapes, case.mask(shapes, device), case.betas, device)
    before = [p.detach().double() for p in problem.params]
    optimizer = pk.MaskedAdam(
        problem.named, problem.mask, LR, case.betas, EPS, clip_value=CLIP, ema=EMA, impl=implementation(device)
    )
    optimizer.step()
    for (name, p), b in zip(problem.named, before):
        truth = b.lerp(p.detach().double(), 1 - EMA)
        check_accuracy(optimizer.ema_weights()[name], b.float().lerp(p.detach(), 1 - EMA), truth)


def gate(case: AdamCase, device: str) -> None:
    """Ours and every peer do what they are compared for."""
    ours, same, dense = OPERATIONS[case.operation]
    for build in (ours, *same):
        check(build, case, device)
    for build in dense:
        check(build, case, device, masked=False)
    if case.operation == "extras":
        check_average(case, device)


def step_cost(case: AdamCase, mask: pk.SaliencyMask | None, n: int, line_bytes: int) -> tuple[float, float]:
    """(bytes, FLOPs) of ours at least: moments of kept weights, and every line of weights and gradients that has one."""
    kept = n if mask is None else mask.count
    per_weight = 4 * (2 * (2 if case.betas[0] else 1))  # moments, read and written
    flops = SPECS["adam_"].flops(kept, 1.0)
    if mask is None:
        lines = 4 * n
    else:
        lines = line_bytes * live_lines([mask.bool(name) for name in mask.names], line_bytes)
    if case.operation == "differentiated":
        return 28 * n + lines + n / 8, SPECS["adam_"].flops(n, 1.0) + kept
    moved = per_weight * kept + 3 * lines + (0 if mask is None else n / 8)
    if case.operation == "compact":
        return moved - lines + 4 * kept, flops
    if case.operation == "extras":
        # The average is read and written; the check is one more comparison on a gradient that is read anyway.
        return moved + 8 * kept, flops + n + 2 * kept + 3 * kept
    return moved, flops


@lru_cache(maxsize=1)
def _problem(name: str, device: str) -> Problem:
    return Problem(network(name), None, BETAS, device)


def adam_case(case: AdamCase, device: str = "cpu") -> Case:
    """Build everything that is timed; weights and gradients are shared by the cases of one tensor list."""
    problem = _problem(case.network, device)
    for name in ("float_masks", "forget", "compact"):
        problem.__dict__.pop(name, None)
    problem.betas, problem.mask = case.betas, case.mask(problem.shapes, device)
    ours, same, dense = OPERATIONS[case.operation]
    n = size(problem.shapes)
    bytes_moved, flops = step_cost(case, problem.mask, n, 64 if device == "cpu" else 32)
    about: dict[str, Any] = describe(problem.mask) if problem.mask is not None else {}
    made: Contender = ours(problem)
    return Case(
        ours=made,
        peers=[build(problem) for build in (*same, *dense)],
        gate=lambda: gate(case, device),
        bytes_moved=bytes_moved,
        flops=flops,
        device=device,
        iteration_flops=iteration_flops(case.network),
        info={**case.__dict__, "weights": n, "impl": implementation(device), **about},
    )
