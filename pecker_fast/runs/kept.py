"""Figures that were made after a run, kept: as a file of their own, or as a line in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.records import EVALUATIONS


def keep_figures(figures: dict[str, Any], run_dir: Path | None = None, json_file: Path | None = None) -> list[Path]:
    """run_dir: add a line to its evaluations.jsonl, beside metrics.json. json_file: written anew. Returns the files."""
    kept = []
    if json_file is not None:
        files.write_json(json_file, figures)
        kept.append(json_file)
    if run_dir is not None:
        path = run_dir / EVALUATIONS
        files.append_line(path, json.dumps(figures, ensure_ascii=False))
        kept.append(path)
    return kept
