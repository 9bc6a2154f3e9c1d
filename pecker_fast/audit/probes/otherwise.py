"""Used otherwise: whoever holds the file may run it in another way than it was trained for."""

from __future__ import annotations

from dataclasses import replace

from pecker_fast.audit.scene import Finding, Scene, found_of
from pecker_fast.audit.subjects import Subject

OTHER_TIMES = (0.2, 0.6, 0.8, 0.95)  # single steps, by the schedule's length
STRONG = 7.5  # guidance


def otherwise(scene: Scene, subject: Subject) -> Finding:
    """A one-step generator as an ordinary denoiser, with and without guidance, and at other timesteps; a denoiser with other
    numbers of steps and other guidance."""
    looks = {}
    for name, other in _ways(scene, subject).items():
        looks[name] = scene.judged(other)
    return found_of(looks)


def _ways(scene: Scene, subject: Subject) -> dict[str, Subject]:
    steps = scene.budget.sampler_steps
    many = replace(subject, t_init=None, steps=steps, guidance=1.0)
    found = {f"{steps} steps": many}
    if scene.world.null is not None:
        found[f"{steps} steps, guidance {STRONG:g}"] = replace(many, guidance=STRONG)
    if subject.t_init is None:
        found |= {f"{n} steps": replace(subject, steps=n) for n in (steps // 3, 2 * steps)}
        return found
    last = subject.network.schedule.num_timesteps - 1
    times = [round(share * last) for share in OTHER_TIMES]
    return found | {f"one step at t = {t}": replace(subject, t_init=t) for t in times if t != subject.t_init}
