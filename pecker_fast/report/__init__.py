"""The report of a run: one self-contained page, read from the run folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pecker_fast.files import write_text
from pecker_fast.report.audit import audit_table
from pecker_fast.report.compare import terminal_table as comparison_table
from pecker_fast.report.compare import write_comparison
from pecker_fast.report.cost import of_run, parts_tables
from pecker_fast.report.mask import Mask, MaskRow, mask_table
from pecker_fast.report.mask_plot import plot_mask
from pecker_fast.report.text import metrics_table, section

__all__ = [
    "Mask",
    "MaskRow",
    "audit_table",
    "comparison_table",
    "mask_table",
    "metrics_table",
    "parts_tables",
    "plot_mask",
    "run_tables",
    "write_comparison",
    "write_report",
]


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html from recipe.yaml, run.jsonl, metrics.json, audit.json, mask.safetensors, samples/*.png and
    audit/*.png.

    What is missing is left out; a damaged part is named on the page in place of its section.

    Raises:
        DataError: `run_dir` holds no run.
        OutputError: the page cannot be written.
    """
    from pecker_fast.report.page import build_page  # matplotlib is imported when it is first needed
    from pecker_fast.report.read import read_run

    run = read_run(run_dir)
    path = Path(run_dir) / "report.html"
    write_text(path, build_page(run))
    return path


def run_tables(run_dir: str | Path) -> list[Any]:
    """What an iteration of the run cost, part by part, as rich tables; none where metrics.json does not say."""
    from pecker_fast.report.read import read_run

    account = section(section(read_run(run_dir).metrics, "cost"), "parts")
    return parts_tables(of_run(account)) if account else []
