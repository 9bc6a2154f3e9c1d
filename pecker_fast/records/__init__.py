"""What a run writes while it goes: its folder, its checkpoints, its events."""

from pecker_fast.records.checkpoint import (
    generator_tensors,
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint_stage,
    save_checkpoint,
)
from pecker_fast.records.events import EVENTS, NoTracker, Tracker, read_events, require_tensorboard
from pecker_fast.records.inputs import Inputs, read_inputs, take_inputs
from pecker_fast.records.manifest import other_machine, read_manifest, verify_checkpoint
from pecker_fast.records.metrics import METRICS, read_metrics, sound_metrics, write_metrics
from pecker_fast.records.pool import keep_pool, kept_pool
from pecker_fast.records.proof import check_prompts, check_run, known_base, known_start, recipe_doubts
from pecker_fast.records.run_folder import (
    BASE,
    EVALUATIONS,
    MASK,
    PIPELINE,
    POOL,
    RECIPE,
    begun_with,
    is_ours,
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
    "POOL",
    "RECIPE",
    "Inputs",
    "NoTracker",
    "Tracker",
    "begun_with",
    "check_prompts",
    "check_run",
    "generator_tensors",
    "is_ours",
    "is_run_folder",
    "keep_pool",
    "kept_pool",
    "known_base",
    "known_start",
    "latest_checkpoint",
    "load_checkpoint",
    "locked",
    "open_run_folder",
    "other_machine",
    "plan_run_folder",
    "read_checkpoint_stage",
    "read_events",
    "read_inputs",
    "read_manifest",
    "read_metrics",
    "read_recipe",
    "recipe_doubts",
    "require_tensorboard",
    "save_checkpoint",
    "sound_metrics",
    "sweep_run_folder",
    "take_inputs",
    "trajectory_sha256",
    "verify_checkpoint",
    "write_metrics",
]
