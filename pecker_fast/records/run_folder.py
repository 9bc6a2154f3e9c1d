"""The run folder: whose it is, where it stopped, and what of it is left standing when it starts over."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.audit import AUDIT, AUDIT_IMAGES
from pecker_fast.errors import CheckpointError, OutputError, PeckerError
from pecker_fast.recipe import Recipe, load_recipe, recipe_to_dict, recipe_to_yaml
from pecker_fast.records.checkpoint import check_identity, latest_checkpoint, list_checkpoints, sweep_checkpoints
from pecker_fast.records.inputs import INPUTS, Inputs, changed_prompts, read_inputs, write_inputs
from pecker_fast.records.manifest import read_manifest, verify_checkpoint
from pecker_fast.records.metrics import METRICS
from pecker_fast.terminal import warn

RECIPE, MASK, REPORT, PIPELINE = "recipe.yaml", "mask.safetensors", "report.html", "pipeline"
POOL = "pool.safetensors"  # images that a method learns from: drawn once, and again where they are gone
EVALUATIONS = "evaluations.jsonl"
# in the order they are wiped: without checkpoints nothing goes on from what is half gone
OWN = (
    "checkpoints",
    PIPELINE,
    METRICS,
    MASK,
    POOL,
    REPORT,
    EVALUATIONS,
    AUDIT,
    AUDIT_IMAGES,
    "run.jsonl",
    "samples",
    "tensorboard",
    "mask.png",
    INPUTS,
)
EXPORTS = ("unet.safetensors", "single.safetensors", "delta.safetensors", "lora.safetensors")
LOCK = ".lock"
WIPING = ".wiping"  # there while a run is wiped: whoever finds it finishes that first, however it was asked to resume
_TORN_MASK = re.compile(rf"\.{re.escape(MASK)}\.[a-z0-9_]{{8}}")
MARK = "# Resolved recipe, written by `pecker-fast train`: a folder with it is a run folder.\n"
_MARKED = re.compile(re.escape(MARK) + r"# sha256 of the lines below: (\S*)\n")
BASE = "base"  # a model given as an object is written here first; it is not wiped when a run starts over


def trajectory(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide every iteration: a run may be resumed with another length, evaluation or checkpoint rhythm."""
    data = recipe_to_dict(recipe)
    for key in ("steps", "audit", "checkpoint", "output", "resume"):
        del data[key]
    if data["null_class"] is None:  # as in runs that were started before there was such a key
        del data["null_class"]
    if recipe.student == "full":
        del data["student"]
    if not recipe.adversary.conditions:
        del data["adversary"]
    elif not recipe.adversary.half_way:
        del data["adversary"]["half_way"]
    for key in ("only", "exclude"):
        if not data["mask"][key]:
            del data["mask"][key]
    if recipe.one_step:  # as before there were others
        del data["images"], data["objective"]
    data["evaluate"] = {"teacher_steps": recipe.evaluate.teacher_steps}  # the saliency pass may draw with the teacher
    for key in ("stall_s", "cuda_graph", "threads", "offload", "deepspeed", "shard_teacher"):  # how fast, not what
        del data["engine"][key]
    if recipe.engine.norms == "plain":
        del data["engine"]["norms"]
    data["engine"]["zero"] = min(recipe.engine.zero, 1)  # the stages of ZeRO read each other's checkpoints
    return data


def trajectory_sha256(recipe: Recipe) -> str:
    return files.sha256_value(trajectory(recipe))


@dataclass(frozen=True)
class Plan:
    """What is to happen to `output`: go on from `checkpoint` (None: from the start), after a wipe or not."""

    run_dir: Path
    checkpoint: Path | None
    wipe: bool


def plan_run_folder(recipe: Recipe, identity: dict[str, str]) -> Plan:
    """Look, and touch nothing. identity: what a checkpoint must belong to, see `save_checkpoint`.

    Raises OutputError for a folder of another run or of something else, CheckpointError when there is nothing to resume or
    when it is another run's.
    """
    run_dir = Path(recipe.output)
    if run_dir.exists() and not run_dir.is_dir():
        raise OutputError(f"{run_dir}: is a file; give another output")
    names = {p.name for p in run_dir.iterdir() if not is_ours(p)} - {BASE} if run_dir.is_dir() else set()
    if names and not is_run_folder(run_dir):
        raise OutputError(f"{run_dir}: is not empty and not a run folder; give another output")
    if recipe.resume == "never":
        return Plan(run_dir, None, wipe=True)
    wiping = (run_dir / WIPING).is_file()
    given = None
    if recipe.resume != "auto":
        given = _explicit_checkpoint(Path(recipe.resume))
        check_identity(given, identity, recipe.distill_steps)
    if not names or wiping:
        return Plan(run_dir, given, wipe=wiping)
    own = _own_checkpoint(recipe, run_dir, identity)
    if given is not None and run_dir.resolve() in given.resolve().parents:
        own = None  # one of this very folder was named: that one
    if given is not None and own is not None and _step(own) >= _step(given):
        given = None  # this run began there and has gone on since
    checkpoint = given or own
    if checkpoint is None and (run_dir / PIPELINE).is_dir():
        raise OutputError(f"{run_dir}: holds a finished run without checkpoints; give another output, or resume=never")
    return Plan(run_dir, checkpoint, wipe=checkpoint is None)


def _own_checkpoint(recipe: Recipe, run_dir: Path, identity: dict[str, str]) -> Path | None:
    """The newest whole checkpoint in the folder; raises OutputError where the run there is another.

    A recipe.yaml that says otherwise is believed less than a checkpoint of this very recipe, and is written anew.
    """
    own, refused = None, None
    try:
        own = latest_checkpoint(run_dir, warn, identity, recipe.distill_steps)
    except CheckpointError as error:
        refused = error
    try:
        _same_recipe(recipe, run_dir)
    except PeckerError as error:
        if own is None or not identity:
            raise
        warn(f"{run_dir / RECIPE}: not what this run was trained with ({error}); it is written anew")
    if refused is not None:
        raise refused
    return own


def marked(text: str) -> str:
    """recipe.yaml as a run has it: our mark and a checksum above the recipe."""
    return f"{MARK}# sha256 of the lines below: {hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def is_as_marked(text: str) -> bool:
    """Whether a recipe.yaml is what its checksum was taken over; those of earlier versions have none."""
    found = _MARKED.match(text)
    return found is None or found[1] == hashlib.sha256(text[found.end() :].encode()).hexdigest()


def is_run_folder(folder: Path) -> bool:
    """Whether `train` wrote it: its recipe.yaml begins with our mark."""
    path = folder / RECIPE
    return path.is_file() and files.read_text(path).startswith(MARK)


def begun_with(recipe: Recipe) -> Recipe:
    """The recipe with the paths and prompts that the run in its output began with, where there is one to go on with.

    Raises ModelError where what it began with is gone.
    """
    run_dir = Path(recipe.output)
    if recipe.resume == "never" or not run_dir.is_dir() or not is_run_folder(run_dir):
        return recipe
    inputs = read_inputs(run_dir)
    if inputs is None or not list_checkpoints(run_dir):
        return recipe
    located = inputs.located(recipe, run_dir, needed=("model", "model_config", "generator"))
    if (key := changed_prompts(inputs, recipe)) is not None:
        warn(
            f"{key}: its prompts have changed since the run in {run_dir} began; it goes on with those of then; "
            "resume=never starts over"
        )
    return located


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe`; the output of a run's own recipe.yaml is the folder it lies in, wherever that was moved."""
    recipe, path = load_recipe(source, overrides), Path(source)
    named = any(text.partition("=")[0].strip() == "output" for text in overrides)
    if path.name != RECIPE or named or not is_run_folder(path.parent):
        return recipe
    return recipe.model_copy(update={"output": str(path.parent)})


def open_run_folder(recipe: Recipe, plan: Plan, inputs: Inputs | None = None) -> None:
    """Carry the plan out: clear away what a killed process left, wipe what is to go, write the resolved recipe.

    The recipe of before, whose mark makes the folder a run folder, is replaced at the end and never missing.
    """
    run_dir = plan.run_dir
    wiped: list[Path] = []
    with files.output_errors(run_dir):
        sweep_run_folder(run_dir)
        if plan.wipe:
            wiped = [run_dir / name for name in OWN if os.path.lexists(run_dir / name)]
        if wiped:
            files.write_text(run_dir / WIPING, "")
        for path in wiped:
            files.remove_tree(path)
    files.write_text(run_dir / RECIPE, marked(recipe_to_yaml(recipe)))
    if inputs is not None:
        write_inputs(run_dir, inputs)
    if plan.wipe and (run_dir / WIPING).exists():
        with files.output_errors(run_dir):
            files.remove(run_dir / WIPING)


def sweep_run_folder(run_dir: Path) -> None:
    """Clear away what a killed process has left of what a run writes; for the holder of the run's lock."""
    files.sweep(run_dir, {RECIPE, WIPING, *OWN, *EXPORTS})
    for entry in run_dir.glob(f".{MASK}.*"):
        if _TORN_MASK.fullmatch(entry.name):
            files.discard(entry)
    files.sweep(run_dir / "samples")
    sweep_checkpoints(run_dir)


def is_ours(path: Path) -> bool:
    """Whether an entry of a folder is none of a user's though the folder has no mark yet: the lock, what a killed process left."""
    return path.name in (LOCK, WIPING) or files.is_left_over(path) or _TORN_MASK.fullmatch(path.name) is not None


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process; raises OutputError when another process trains in it."""
    with files.output_errors(run_dir):
        files.make_folder(run_dir)
        files.disk_step(f"write:{LOCK}")
        file = (run_dir / LOCK).open("w")
    with file:
        files.lock(file.fileno(), f"{run_dir}: another process is training in it")
        yield


def _step(checkpoint: Path) -> int:
    return int(read_manifest(checkpoint)["step"])


def _explicit_checkpoint(path: Path) -> Path:
    """`resume=PATH`: a checkpoint folder, or a run folder whose newest whole checkpoint is meant."""
    if (path / "manifest.json").is_file():
        verify_checkpoint(path)
        return path
    found = latest_checkpoint(path, warn=warn) if path.is_dir() and list_checkpoints(path) else None
    if found is None:
        raise CheckpointError(
            f"resume: there is no checkpoint at {path}; give a checkpoints/step-… folder, or resume=never"
        )
    return found


def _same_recipe(recipe: Recipe, run_dir: Path) -> None:
    there = load_recipe(run_dir / RECIPE)
    mine, theirs = _flat(trajectory(recipe)), _flat(trajectory(there))
    for key in dict.fromkeys((*mine, *theirs)):
        if theirs.get(key) != mine.get(key):
            raise OutputError(
                f"{run_dir}: holds another run ({key} is {theirs.get(key)} there, {mine.get(key)} here); "
                "give another output, or resume=never to start over in it"
            )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
