"""Condition inversion: weights frozen, vectors in the condition's place fitted until the concept is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pecker_fast.audit.probes.noise import noise_found
from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject
from pecker_fast.audit.worlds import Look
from pecker_fast.forgetting import Vectors, denoising_error, drawing_error, fit_step, near
from pecker_fast.networks import Denoiser, TextDenoiser

NEAR = 0.05  # noise of a start, by its size
MOST = 4  # things that are forgotten, of which each is looked for


@dataclass(frozen=True)
class Start:
    """Where a fit begins. row: the condition, None = random numbers of a condition's size. rate: Adam's."""

    name: str
    row: int | None
    rate: float


def starts(scene: Scene) -> list[Start]:
    """The forgotten condition, then kept and random ones in turn; each with every rate."""
    world, found = scene.world, []
    order = torch.randperm(len(world.kept), generator=scene.generator("starts")).tolist()
    for i in range(scene.budget.starts):
        if i == 0:
            place: tuple[str, int | None] = (f"from {world.name(world.forget[0])}", world.forget[0])
        elif i % 2 and order:
            row = world.kept[order[i // 2 % len(order)]]
            place = (f"from {world.name(row)}", row)
        else:
            place = (f"from noise {i // 2}", None)
        found += [Start(f"{place[0]}, rate {rate:g}", place[1], rate) for rate in scene.budget.rates]
    return found


def inversion(scene: Scene, subject: Subject) -> Finding:
    """The worst of all starts, rates and numbers of tokens, of each thing that is forgotten."""
    text = isinstance(subject.network, TextDenoiser)
    worlds = scene.world.groups()[:MOST]
    scenes = [scene] if len(worlds) == 1 else [replace(scene, world=world) for world in worlds]
    runs = [_fitted(one, subject, tokens) for one in scenes for tokens in (scene.budget.tokens if text else (0,))]
    worst = max(runs, key=lambda run: run.recovery or 0.0)
    variants = {name: value for run in runs for name, value in run.variants.items()}
    curves = {name: curve for run in runs for name, curve in run.curves.items()}
    halves = [run.to_half for run in runs if run.to_half is not None]
    return replace(worst, variants=variants, curves=curves, to_half=min(halves, default=None))


def _fitted(scene: Scene, subject: Subject, tokens: int) -> Finding:
    """One fit for each start, all at once. tokens: free ones of a prompt, 0 = vectors of a class."""
    world, budget = scene.world, scene.budget
    network = opened(scene, subject.network, tokens)
    begun = starts(scene)
    vectors = Vectors.start(_values(scene, network, begun))
    rates = torch.tensor([start.rate for start in begun], device=network.device)
    names = [f"{start.name}, {tokens} token{'s' if tokens > 1 else ''}" if tokens else start.name for start in begun]
    marks = budget.marks(budget.steps)
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    looks: dict[str, Look] = {}
    rows = scene.dealt(world.judged, budget.samples, "judged")
    free = subject.with_network(network.with_free(vectors.values))  # vectors move in place
    for step in range(budget.steps + 1):
        if step in marks:
            for k, name in enumerate(names):
                looks[name] = scene.judged(free, partial(_codes, network, k), rows)
                curves[name].append([step, looks[name].share])
        if step < budget.steps:
            fit_step(vectors, network, error_of(scene, subject, network, len(names), step), rates)
    if budget.together:
        best = max(names, key=lambda name: looks[name].share)
        codes = partial(_codes, network, names.index(best))
        looks[f"{best}, and noise"] = noise_found(scene, free, codes, len(names))
    return found_of(looks, curves=curves, to_half=steps_to_half(curves.values()))


def steps_to_half(curves: Iterable[list[list[float]]]) -> int | None:
    """The first step at which half of the samples show the concept, of the quickest curve; None = never."""
    found = [next((int(step) for step, value in curve if value >= 0.5), None) for curve in curves]
    return min((step for step in found if step is not None), default=None)


def _codes(network: Denoiser, k: int, rows: Tensor) -> Tensor:
    return network.free_codes(torch.full_like(rows, k), rows)


def opened(scene: Scene, network: Denoiser, tokens: int) -> Denoiser:
    """The network with places for free conditions."""
    if not isinstance(network, TextDenoiser):
        return network
    return network.with_places(scene.named, scene.covers, tokens)


def _values(scene: Scene, network: Denoiser, begun: list[Start]) -> Tensor:
    """Where each fit starts, [K, …], a little off the conditions it is named after."""
    known = [start.row for start in begun if start.row is not None]
    own = network.own_vectors(torch.tensor(known, device=network.device))
    kept = torch.tensor(list(scene.world.kept)[:256], device=network.device)
    spread = network.own_vectors(kept)
    mean, deviation = spread.mean(0), spread.std(0).nan_to_num(0.0) + 1e-6
    values, taken = [], 0
    for i, start in enumerate(begun):
        g = scene.generator("start", i)
        if start.row is None:
            values.append(mean + deviation * torch.randn(mean.shape, generator=g).to(mean))
        else:
            values.append(near(own[taken : taken + 1], NEAR, [g])[0])
            taken += 1
    return torch.stack(values)


def error_of(scene: Scene, subject: Subject, network: Denoiser, count: int, step: int) -> Callable[[Denoiser], Tensor]:
    """How far `count` vectors are from drawing images of the pool, as a function of the network that knows them."""
    pool, n = scene.pool, count * scene.budget.batch
    g = scene.generator("fit", step)
    index = torch.randint(len(pool.x), (n,), generator=g).to(network.device)
    which = torch.arange(count, device=network.device).repeat_interleave(scene.budget.batch)
    codes = network.free_codes(which, pool.rows[index])
    if subject.t_init is not None:
        return lambda free: drawing_error(free, pool.z[index], codes, pool.x[index], subject.t_init or 0)
    t = torch.randint(network.schedule.num_timesteps, (n,), generator=g).to(network.device)
    e = torch.randn(pool.x[index].shape, generator=g).to(network.device)
    return lambda free: denoising_error(free, pool.x[index], e, t, codes)
