"""audit.json: what was found, under a checksum, written after every unit so that an interrupted audit is taken up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.audit.subjects import RESULT
from pecker_fast.errors import DataError, PeckerError
from pecker_fast.terminal import warn

AUDIT, AUDIT_IMAGES = "audit.json", "audit"
VERSION = 1


@dataclass
class Record:
    """path: None = kept in memory alone. content: the file's, without its checksum."""

    path: Path | None
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path | None, identity: dict[str, Any], about: dict[str, Any], controls: Path | None = None
    ) -> Record:
        """The record in `folder` where it is of the same audit, else a fresh one. controls: another audit's file, whose controls
        are taken over where they are the very same. Raises DataError where they are not, OutputError."""
        path = None if folder is None else folder / AUDIT
        fresh = cls(path, {"version": VERSION, **about, "identity": identity, "probes": {}, "complete": False})
        if controls is not None:
            fresh.take_controls(controls, identity)
        if path is None or not path.is_file():
            return fresh
        try:
            found = read_audit(path)
        except PeckerError as error:
            warn(f"{error}; the audit begins anew")
            return fresh
        if found.get("identity") != identity:
            return fresh
        for probe, one in found.get("probes", {}).items():
            kept = fresh.content["probes"].setdefault(probe, {"says": one["says"], "figures": {}})
            kept["figures"] |= one["figures"]
        return fresh

    def take_controls(self, path: Path, identity: dict[str, Any]) -> None:
        """The figures of all but the result."""
        found = read_audit(path)
        if _of_controls(found.get("identity", {})) != _of_controls(identity):
            raise DataError(
                f"{path}: an audit with other controls, seed, budget or judges; nothing of it can be taken over"
            )
        for probe, one in found["probes"].items():
            figures = {role: figures for role, figures in one["figures"].items() if role != RESULT}
            self.content["probes"][probe] = {"says": one["says"], "figures": figures}

    def has(self, probe: str, role: str) -> bool:
        return role in self.figures(probe)

    def figures(self, probe: str) -> dict[str, Any]:
        """By subject."""
        found: dict[str, Any] = self.content["probes"].get(probe, {}).get("figures", {})
        return found

    def add(self, probe: str, says: str, role: str, figures: dict[str, Any]) -> None:
        """Raises OutputError."""
        self.content["probes"].setdefault(probe, {"says": says, "figures": {}})["figures"][role] = figures
        self._write()

    def conclude(self, probe: str, verdict: dict[str, Any]) -> None:
        self.content["probes"][probe] |= verdict

    def finish(self, probes: Sequence[str], overall: Callable[[Sequence[str]], str]) -> dict[str, Any]:
        """Write and return the whole record; probes: those of this audit, in order."""
        known = {name: one for name, one in self.content["probes"].items() if RESULT in one["figures"]}
        self.content["probes"] = {name: known[name] for name in [*probes, *(n for n in known if n not in probes)]}
        kinds = [one["verdict"] for one in known.values() if one.get("verdict")]
        self.content |= {"verdict": overall(kinds), "complete": True}
        self._write()
        return self.content

    def _write(self) -> None:
        if self.path is not None:
            files.write_sealed(self.path, self.content)


def _of_controls(identity: dict[str, Any]) -> dict[str, Any]:
    subjects = {name: one for name, one in identity.get("subjects", {}).items() if name != RESULT}
    return {**identity, "subjects": subjects}


def read_audit(path: Path) -> dict[str, Any]:
    """What an audit.json holds. Raises DataError where it is damaged or of another version."""
    found = files.read_sealed(path, error=DataError)
    if found.get("version") != VERSION:
        raise DataError(f"{path}: an audit of version {found.get('version')}, {VERSION} is expected")
    return found
