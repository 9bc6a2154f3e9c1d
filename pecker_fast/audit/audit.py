"""The audit: every probe on every subject, recorded as it goes, and the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.audit.probes import PROBES, Probe
from pecker_fast.audit.record import AUDIT_IMAGES, Record
from pecker_fast.audit.scene import Finding, Scene
from pecker_fast.audit.subjects import BEFORE, NEVER, RELABEL, RESULT, Subject
from pecker_fast.audit.verdict import hull, interval, overall, verdict_on, verdict_on_loss
from pecker_fast.audit.worlds import SHOWN
from pecker_fast.evaluate import Interval
from pecker_fast.forgetting import save_grid

Told = Callable[[str, str, int, int], object]  # (probe, subject, units done, units in all)


@dataclass
class Audit:
    """subjects: by name, the result first; names of models that never knew begin with "never knew"."""

    scene: Scene
    subjects: Mapping[str, Subject]
    probes: Sequence[str]
    folder: Path | None = None  # audit.json and audit/ go there; None = nowhere
    about: dict[str, Any] = field(default_factory=dict)  # what else the record says
    told: Told = lambda probe, subject, done, total: None
    controls: Path | None = None  # audit.json of another run, see `Record.open`

    def identity(self) -> dict[str, Any]:
        """What a finding depends on: an audit of the same is taken up, another one begins anew."""
        world, scene = self.scene.world, self.scene
        return {
            "seed": scene.seed,
            "budget": scene.budget.plain(),
            "subjects": {
                name: {"sha256": subject.sha256(), "t_init": subject.t_init, "steps": subject.steps, "guidance": subject.guidance}
                for name, subject in self.subjects.items()
            },
            "judges": world.judges,
            "rows": files.sha256_value([world.forget, world.cover, world.kept, world.judged, world.judged_kept, scene.prompts]),
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """All that is not on record yet, then the verdicts. Returns the record."""
        record = Record.open(self.folder, self.identity(), self.about, self.controls)
        units = [(PROBES[name], role) for name in self.probes for role in self.subjects]
        for done, (probe, role) in enumerate(units):
            self.told(probe.name, role, done, len(units))
            if not record.has(probe.name, role):
                finding = self.unit(probe, role)
                self.keep_images(probe, role, finding)
                record.add(probe.name, probe.says, role, plain(finding))
        for name in self.probes:
            verdict = judged(PROBES[name], record.figures(name))
            record.conclude(name, verdict)
        return record.finish(list(self.probes), overall)

    def unit(self, probe: Probe, role: str) -> Finding:
        """One probe on one subject. Of the model before nothing has to be fitted: it draws the concept when asked."""
        scene = self.scene
        if role == BEFORE:
            still = replace(
                scene.budget, steps=0, noise_steps=0, relearn_steps=0, starts=1, tokens=scene.budget.tokens[:1]
            )
            scene = replace(scene, budget=still)
        return probe.run(scene, self.subjects[role])

    def keep_images(self, probe: Probe, role: str, finding: Finding) -> None:
        if self.folder is None or finding.images is None:
            return
        into = self.folder / AUDIT_IMAGES
        files.make_folder(into)
        save_grid(finding.images, SHOWN, into / f"{probe.name}-{role.replace(' ', '_')}.png")


def plain(finding: Finding) -> dict[str, Any]:
    """As JSON; shares with their intervals."""
    found = {key: value for key, value in vars(finding).items() if key != "images"}
    if finding.recovery is not None:
        between = interval(finding.recovery, finding.samples)
        found["interval"] = [between.low, between.high]
    return found


def judged(probe: Probe, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"verdict", "why"} of a probe's figures by subject."""
    found = {
        role: Interval(one["recovery"], *one["interval"])
        for role, one in figures.items()
        if one["recovery"] is not None
    }
    result = found.get(RESULT)
    if result is None:
        why = figures.get(RESULT, {}).get("why") or "it was not looked at"
        return {"verdict": None, "why": why}
    if probe.losses:
        verdict = verdict_on_loss(result, found.get(BEFORE))
    else:
        floor = hull([one for role, one in found.items() if role.startswith(NEVER)])
        verdict = verdict_on(result, found.get(RELABEL), floor)
    return {"verdict": verdict.kind, "why": verdict.why}
