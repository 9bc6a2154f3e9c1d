"""Stages that are commands of the project: test suites, and the digits as a user trains them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rows import put

TINY = os.environ.get("BENCH_SCALE") == "tiny"
SMALL = [
    "steps=2", "batch_size=2", "mask.samples=4", "evaluate.every=0", "evaluate.final=8", "adversary.samples=4", "audit.budget=none",
]  # fmt: skip


def tests(folder: Path, *paths: str) -> int:
    """A suite, spread over processes where pytest-xdist is there, each test with a limit where pytest-timeout is."""
    options = ["-o", "addopts=-q", "-p", "no:cacheprovider", "-v", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "8"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=60"]
    if TINY:
        options += ["--collect-only"]
    code = subprocess.run([sys.executable, "-m", "pytest", *options, *paths]).returncode
    code = 0 if TINY and code == 5 else code  # without a GPU nothing is collected
    put(folder, tests=list(paths), rc=code)
    return code


def digits(folder: Path, how: str) -> int:
    """`train digits`, whole, eager or as a CUDA graph."""
    run = folder / f"digits-{how}"
    graph = ["engine.cuda_graph=true"] if how == "graph" and not TINY else []
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pecker_fast",
        "train",
        "digits",
        f"output={run}",
        "resume=never",
        *graph,
        *(SMALL if TINY else []),
    ]
    code = subprocess.run(command).returncode
    wall = round(time.perf_counter() - start, 1)
    metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
    kept = {key: metrics.get(key) for key in ("before", "after", "cost")}
    put(folder, what=f"train digits, {how}", rc=code, wall_s=wall, metrics=kept)
    return code
