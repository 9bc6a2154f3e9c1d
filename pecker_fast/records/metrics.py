"""metrics.json of a run folder: figures that cards and pages state, under a checksum and with the hash of their recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import DataError, PeckerError
from pecker_fast.terminal import warn

METRICS = "metrics.json"
OF = "recipe_sha256"


def write_metrics(run_dir: Path, metrics: Mapping[str, Any], recipe_sha256: str) -> None:
    """Raises OutputError."""
    files.write_sealed(run_dir / METRICS, {**metrics, OF: recipe_sha256})


def read_metrics(run_dir: Path, recipe_sha256: str | None = None) -> dict[str, Any]:
    """The figures of a run; none where it has none yet. Raises DataError where they are damaged, or another recipe's."""
    path = run_dir / METRICS
    if not path.is_file():
        return {}
    found = files.read_sealed(path, error=DataError)
    of = found.pop(OF, None)
    if recipe_sha256 is not None and of not in (None, recipe_sha256):
        raise DataError(f"{path}: the figures of another run")
    return found


def sound_metrics(run_dir: Path, recipe_sha256: str) -> dict[str, Any]:
    """`read_metrics`, of which nothing is believed, with a warning, where they are damaged."""
    try:
        return read_metrics(run_dir, recipe_sha256)
    except PeckerError as error:
        warn(f"{error}; nothing is taken from it, as if the run had not been judged")
        return {}
