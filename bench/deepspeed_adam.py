"""DeepSpeed's Adam as a peer: compiled once by `make bench`, inside the environment, and by nothing else.

    python bench/deepspeed_adam.py        # compile it, if it is not there yet

DeepSpeed compiles an operation the first time it is asked for, in the home folder, under a lock file that outlives a killed
compiler and stops every later run. Here the lock is the kernel's, which ends with its process, and who only measures loads what
has been built or leaves the peer out.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

NAMES = {"cpu": "cpu_adam", "cuda": "fused_adam"}
BUILDERS = {"cpu": "CPUAdamBuilder", "cuda": "FusedAdamBuilder"}


def folder() -> Path:
    """Where the operation of this Python and torch is kept."""
    version = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
    return Path(sys.prefix) / "torch_extensions" / version


def installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def built(device: str) -> bool:
    """Whether the peer can be timed: it is compiled and whole."""
    return installed() and (folder() / f"{NAMES[device]}.built").is_file()


@contextmanager
def _alone() -> Iterator[None]:
    """One process builds; the lock goes with it, whatever ends it."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(device: str) -> None:
    """Compile the operation where it is not there yet."""
    with _alone():
        if built(device):
            return
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder())
        (folder() / NAMES[device] / "lock").unlink(missing_ok=True)  # of a build that was killed: nobody else is here
        from deepspeed.ops import op_builder

        getattr(op_builder, BUILDERS[device])().load(verbose=False)
        (folder() / f"{NAMES[device]}.built").touch()


@cache
def load(device: str) -> Any:
    """The compiled module, put where DeepSpeed looks before it compiles."""
    name = NAMES[device]
    spec = importlib.util.spec_from_file_location(name, folder() / name / f"{name}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder._loaded_ops[name] = module
    return module


def adam(device: str, params: Any, **settings: Any) -> Any:
    """DeepSpeedCPUAdam or FusedAdam over the parameters, without compiling anything. Raises where it is not `built`."""
    load(device)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if device == "cpu":
        return DeepSpeedCPUAdam(params, adamw_mode=False, **settings)
    return FusedAdam(params, adam_w_mode=False, **settings)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if installed():
        build(device)
        print(f"DeepSpeed's Adam: {folder() / NAMES[device]}")
    else:
        print("DeepSpeed is not installed: it is left out of the benchmark")
