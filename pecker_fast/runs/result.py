"""What a run comes to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What `train` leaves: the run folder, its metrics (None after a dry run) and the report. found: rows of a dry run.
    audit: the record of the audit, where the recipe asks for one."""

    run_dir: Path
    metrics: dict[str, Any] | None
    report: Path | None
    found: tuple[tuple[str, str], ...] = ()
    audit: dict[str, Any] | None = None
