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
from pecker_fast.records.inputs import Inputs, read_inputs, take_inputs
from pecker_fast.records.run_folder import (
    BASE,
    EVALUATIONS,
    MASK,
    METRICS,
    PIPELINE,
    RECIPE,
    begun_with,
    is_run_folder,
    locked,
    open_run_folder,
    plan_run_folder,
    read_recipe,
    sweep_run_folder,
    trajectory_sha256,
)

__all__ = [
    "BASE",
    "EVALUATIONS",
    "EVENTS",
    "MASK",
    "METRICS",
    "PIPELINE",
    "RECIPE",
    "Inputs",
    "NoTracker",
    "Tracker",
    "begun_with",
    "generator_tensors",
    "is_run_folder",
    "latest_checkpoint",
    "load_checkpoint",
    "locked",
    "open_run_folder",
    "plan_run_folder",
    "read_checkpoint_stage",
    "read_events",
    "read_inputs",
    "read_recipe",
    "require_tensorboard",
    "save_checkpoint",
    "sweep_run_folder",
    "take_inputs",
    "trajectory_sha256",
    "verify_checkpoint",
]
