"""The eight probes, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pecker_fast.audit.probes.conditions import inversion
from pecker_fast.audit.probes.disturbed import disturbed
from pecker_fast.audit.probes.halfway import half_way
from pecker_fast.audit.probes.neighbours import neighbours
from pecker_fast.audit.probes.noise import noise_inversion
from pecker_fast.audit.probes.otherwise import otherwise
from pecker_fast.audit.probes.relearn import relearning
from pecker_fast.audit.probes.words import asked_otherwise
from pecker_fast.audit.scene import Finding, Scene
from pecker_fast.audit.subjects import Subject


@dataclass(frozen=True)
class Probe:
    """name: as in `--probes`. says: what is done, for a reader. run: on one subject. losses: it counts what is lost, not what
    comes back."""

    name: str
    says: str
    run: Callable[[Scene, Subject], Finding]
    losses: bool = False


PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Probe("prompts", "asked for by other conditions and words", asked_otherwise),
        Probe("condition", "condition vectors fitted, weights frozen", inversion),
        Probe("noise", "noise fitted to images of the concept", noise_inversion),
        Probe("halfway", "half-noised images of the concept finished", half_way),
        Probe("relearn", "trained again on a few images of the concept", relearning),
        Probe("disturbed", "weights rounded, shaken, pruned, tuned on the rest", disturbed),
        Probe("otherwise", "run with other steps, timesteps and guidance", otherwise),
        Probe("neighbours", "the nearest kept conditions, share drawn wrong", neighbours, losses=True),
    )
}
