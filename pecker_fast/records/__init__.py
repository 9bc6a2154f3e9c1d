"""What a run writes while it goes: its folder, its checkpoints, its events."""

from pecker_fast.records.checkpoint import (
    generator_tensors,
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint_stage,
    save_checkpoint,
    verify_checkpoint,
)
from pecker_fast.records.events import EVENTS, NoTracker, Tracker, read_events, require_tensorboard
from pecker_fast.records.run_folder import (
    BASE,
    EVALUATIONS,
    MASK,
    METRICS,
    PIPELINE,
    RECIPE,
    is_run_folder,
    locked,
    note,
    open_run_folder,
    plan_run_folder,
    trajectory_sha256,
    warn,
)

__all__ = [
    "BASE",
    "EVALUATIONS",
    "EVENTS",
    "MASK",
    "METRICS",
    "PIPELINE",
    "RECIPE",
    "NoTracker",
    "Tracker",
    "generator_tensors",
    "is_run_folder",
    "latest_checkpoint",
    "load_checkpoint",
    "locked",
    "note",
    "open_run_folder",
    "plan_run_folder",
    "read_checkpoint_stage",
    "read_events",
    "require_tensorboard",
    "save_checkpoint",
    "trajectory_sha256",
    "verify_checkpoint",
    "warn",
]
