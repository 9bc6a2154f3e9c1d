"""What this machine and this installation offer: the start event of a run, and `pecker-fast doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pecker_fast import files
from pecker_fast.errors import ModelError, PeckerError
from pecker_fast.recipe import Recipe

# distribution, what it is for, the extra that brings it (None: always installed)
PACKAGES: tuple[tuple[str, str, str | None], ...] = (
    ("torch", "tensors", None),
    ("diffusers", "models and schedules", None),
    ("safetensors", "files", None),
    ("transformers", "text encoders", None),
    ("torchmetrics", "FID and the like", None),
    ("triton", "kernels on a GPU; comes with torch's CUDA builds", None),
    ("scikit-learn", "the digits data, for `pretrain digits`", "eval"),
    ("tensorboard", "`train --tensorboard`", "track"),
    ("deepspeed", "several GPUs", None),
)
OPTIONAL = frozenset({"triton", "deepspeed", "scikit-learn", "tensorboard"})
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `missing` is what must be mended, `note` what need not be."""

    name: str
    state: Literal["ok", "missing", "note"]
    found: str
    remedy: str = ""


def doctor(recipe: Recipe | None = None) -> list[Check]:
    """Versions, backends, memory and disk; with a recipe also its model, its output folder and its extras."""
    checks = [Check("python", "ok", platform.python_version())]
    checks += [_package(*package) for package in PACKAGES]
    checks += [_processor(), _native(), *_gpus(), _memory(), _disk(Path(recipe.output) if recipe else Path())]
    if recipe is not None:
        checks += _model("model", recipe.model, recipe.revision)
        checks += _model("generator", recipe.generator) if recipe.generator else []
    return checks


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, read without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, use: str, extra: str | None) -> Check:
    version = version_of(name)
    if version is not None:
        return Check(name, "ok", version)
    remedy = f"pip install 'pecker-fast[{extra}]'" if extra else f"pip install {name}"
    if name == "triton":
        return Check(name, "note", "absent", use)
    return Check(name, "note" if name in OPTIONAL else "missing", "absent", f"for {use}: {remedy}")


def cpu_name() -> str:
    """Model name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


def _processor() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if version_of("torch") is None:
        return Check("processor", "ok", f"{cpu_name()}, {usable} cores")
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    return Check("processor", "ok", f"{cpu_name()}, {usable} cores, {threads()} threads, {level}")


def _native() -> Check:
    """State of the compiled CPU kernels."""
    try:
        cpu: Any = importlib.import_module("pecker_kernels.native")
        cpu.library()
        found = f"{cpu.LEVELS[cpu.cpu_level()]}, {cpu.find_library()}"
    except Exception as reason:  # whatever it is, the report goes on and shows it
        line = (str(reason).splitlines() or [type(reason).__name__])[0]
        return Check("native kernels", "note", f"not loaded: {line}", "pip install . with a C++17 compiler builds them")
    return Check("native kernels", "ok", found)


def _gpus() -> list[Check]:
    if version_of("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return [Check("GPU", "note", "none", "everything runs on the processor")]
    checks = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        checks.append(Check(f"GPU {index}", "ok", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"))
    return checks


def memory_bytes() -> int:
    """Main memory of the machine, or of the control group that holds the process if that is less; 0 if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total


def _memory() -> Check:
    total = memory_bytes()
    few = 0 < total < 2 * GIB
    return Check("memory", "note" if few else "ok", f"{total / GIB:.1f} GiB", "use a small batch_size" if few else "")


def _disk(output: Path) -> Check:
    folder = output.absolute()
    while not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Check("disk", "missing", f"{folder} is not writable", "choose another output folder")
    free = shutil.disk_usage(folder).free
    few = free < GIB
    remedy = "free some space, or choose another output folder" if few else ""
    return Check(
        "disk", "missing" if free < GIB // 16 else "note" if few else "ok", f"{free / GIB:.1f} GiB free", remedy
    )


def _model(key: str, name: str, revision: str | None = None) -> list[Check]:
    """Whether a model is there and would be taken; of a hub model only what is small is fetched for it."""
    try:
        if files.is_hub_name(name):
            folder = files.look_at_hub(name, revision)
            remedy = "of the Hugging Face hub; `train` fetches it, or give a local folder"
            found = Check(key, "note", name if folder else f"{name}: the hub could not be asked", remedy)
        else:
            folder = files.resolve_model(name)
            if folder.is_file():
                files.check_tensors(folder, error=ModelError)
            else:
                files.check_model_folder(folder)
            found = Check(key, "ok", str(folder) if str(folder) == name else f"{name} ({folder})")
    except PeckerError as reason:
        return [Check(key, "missing", str(reason))]
    return [found, *(Check(key, "note", note) for note in (files.model_notes(folder) if folder else ()))]


def device_name() -> str:
    """The device that runs use: the first GPU, else the processor."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu_name()


def environment() -> dict[str, Any]:
    """`versions`, `device` and `threads` for the start event of a run."""
    from pecker_fast import __version__

    names = ("torch", "diffusers", "safetensors", "numpy", "torchmetrics", "triton")
    versions = {"pecker-fast": __version__, "python": platform.python_version()}
    versions |= {name: version for name in names if (version := version_of(name)) is not None}
    return {"versions": versions, "device": device_name(), "threads": threads()}


def numerics() -> dict[str, Any]:
    """What the last bits of a run depend on beside its recipe: the device, on a processor also instruction sets and threads."""
    import torch

    found: dict[str, Any] = {"device": device_name(), "torch": torch.__version__}
    if not torch.cuda.is_available():
        found |= {"instructions": _instructions(), "threads": threads()}
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return found | {"ranks": world}


def _instructions() -> str:
    """Those that torch and the compiled kernels use."""
    import torch
    from pecker_kernels import native

    kernels = native.LEVELS[native.cpu_level()] if native.available() else "none"
    return f"{torch.backends.cpu.get_cpu_capability()}, kernels {kernels}"


def peak_memory_bytes() -> int:
    """Most memory used so far: of the GPU that torch allocated, else of the process in main memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
