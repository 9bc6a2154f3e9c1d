"""The loop, one training, judging it, and the verbs over a run."""

from pecker_fast.runs.auditing import Asked, audit_run
from pecker_fast.runs.benchmark import bench
from pecker_fast.runs.comparing import COLUMNS as COMPARED
from pecker_fast.runs.comparing import compare as compare_methods
from pecker_fast.runs.finished import apply_delta_file, evaluate_run, export_run, sample_run
from pecker_fast.runs.forecast import check_memory
from pecker_fast.runs.kept import keep_figures
from pecker_fast.runs.planning import plan_rows
from pecker_fast.runs.protocols import evaluate_protocol
from pecker_fast.runs.start import distill, train, unlearn

__all__ = [
    "COMPARED",
    "Asked",
    "apply_delta_file",
    "audit_run",
    "bench",
    "check_memory",
    "compare_methods",
    "distill",
    "evaluate_protocol",
    "evaluate_run",
    "export_run",
    "keep_figures",
    "plan_rows",
    "sample_run",
    "train",
    "unlearn",
]
