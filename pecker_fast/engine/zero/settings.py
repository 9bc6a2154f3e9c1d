"""What DeepSpeed is told: our own settings, and those of the user's JSON that cannot make a run wrong."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from pecker_fast import files
from pecker_fast.errors import RecipeError
from pecker_fast.recipe import Recipe

LEAST = (0, 19)
# Keys that change how fast bytes travel and what is logged, never what is computed.
FREE = {
    "zero_optimization": {
        "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "overlap_comm", "contiguous_gradients",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "pin_memory",
    },
    "comms_logger": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "steps_per_print": None,
}  # fmt: skip


def require_deepspeed() -> None:
    """Raise RecipeError, naming the extra, where DeepSpeed is missing or too old."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "engine.zero: DeepSpeed is not installed; pip install 'pecker-fast[deepspeed]', or engine.zero=0"
        )
    found = importlib.metadata.version("deepspeed")
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST:
        raise RecipeError(f"engine.zero: DeepSpeed {found} is too old; 0.19 or newer is needed")


def check_recipe(recipe: Recipe, world: int) -> None:
    """Raise RecipeError for what the sharded engine does not do, or not with this many ranks."""
    engine = recipe.engine
    if recipe.batch_size % world:
        raise RecipeError(
            f"batch_size: {recipe.batch_size} samples cannot be shared by {world} ranks; give a multiple of {world}"
        )
    if recipe.uses_adversary and recipe.adversary.batch % world:
        raise RecipeError(
            f"adversary.batch: {recipe.adversary.batch} samples cannot be shared by {world} ranks; give a multiple of {world}"
        )
    share = recipe.batch_size // world
    if engine.micro_batch > share:
        raise RecipeError(f"engine.micro_batch: {engine.micro_batch} is more than a rank's {share} samples; lower it")
    if engine.compile != "none":
        raise RecipeError("engine.compile: is not supported yet with engine.zero; use engine.compile=none")
    if engine.cuda_graph:
        raise RecipeError("engine.cuda_graph: is not supported with engine.zero; leave it out")
    if recipe.score == "lora" and engine.zero == 3:
        raise RecipeError(
            "score: lora shares the teacher's weights, which stage 3 would scatter; use engine.zero=2 or score=full"
        )
    if engine.shard_teacher and (engine.zero != 3 or recipe.score == "lora"):
        raise RecipeError("engine.shard_teacher: needs engine.zero=3 and score=full")
    if engine.deepspeed is not None:
        read_user_settings(Path(engine.deepspeed))


def read_user_settings(path: Path) -> dict[str, Any]:
    """The user's DeepSpeed JSON. Raises RecipeError naming the first key that would change what is computed."""
    given = files.read_json(path, error=RecipeError)
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: a DeepSpeed configuration is a mapping")
    for key, value in given.items():
        if key not in FREE:
            raise RecipeError(f"{path}: {key} is decided by the recipe; leave it out (free: {', '.join(FREE)})")
        inner = FREE[key]
        if inner is None:
            continue
        if not isinstance(value, dict):
            raise RecipeError(f"{path}: {key} is a mapping")
        for name in value:
            if name not in inner:
                raise RecipeError(
                    f"{path}: {key}.{name} is decided by the recipe; leave it out (free: {', '.join(sorted(inner))})"
                )
    return given


def deepspeed_settings(recipe: Recipe, world: int) -> dict[str, Any]:
    """The JSON of one engine.

    Clipping is off by name: DeepSpeed clips to a norm of 1 where nothing is said. One subgroup, and gradients in rounds
    of nobody's choosing, keep the partitions where our layout of them says.
    """
    engine = recipe.engine
    given = read_user_settings(Path(engine.deepspeed)) if engine.deepspeed else {}
    zero: dict[str, Any] = {"overlap_comm": False, **given.get("zero_optimization", {})}
    zero |= {"stage": engine.zero, "round_robin_gradients": False}
    if engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.zero == 3:
        zero["sub_group_size"] = 10**15
        zero["memory_efficient_linear"] = False  # it exchanges torch's linear layer for one that rounds otherwise
    return {
        **{key: value for key, value in given.items() if key != "zero_optimization"},
        "train_micro_batch_size_per_gpu": recipe.batch_size // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}} if engine.weights == "bf16" else {}),
    }


def initialize(**arguments: Any) -> Any:
    """deepspeed.initialize, which talks on stdout, on the device torch uses: its engine."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.utils import logger

        # It would compile an all-reduce that only inference uses, in the home folder, under a lock that outlives a killed run
        # and stops every later one. (The attribute `deepspeed.comm.torch` is torch itself.)
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None

        logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names it calls
        engine, *_ = deepspeed.initialize(**arguments)
    return engine
