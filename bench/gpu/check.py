"""First contact with a GPU in nine minutes: stages in processes of their own, every number on disk the moment it is known.

    make gpu-check [STAGES=smoke,step] [PYTHON=…]
    python bench/gpu/check.py [--stages NAMES] [--output bench/results/gpu] [--seconds 540]

A stage that fails or runs out of time is written down and the next one begins; what no longer fits is written as skipped. Nothing
is fetched from the network. BENCH_SCALE=tiny: a dry run without a GPU, which proves the check and measures nothing.
Exits with 1 if a stage did not pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench" / "gpu")]

from plan import Stage, chosen  # noqa: E402
from rows import RESULTS, put  # noqa: E402

LEAST_S = 15  # of a stage: less than that is not worth its start
LOG = "log.txt"


def environment(stage: Stage) -> dict[str, str]:
    """Where a stage finds the project; a torch of the machine's own stays in front of nothing."""
    paths = [ROOT / "kernels", ROOT, ROOT / "bench", ROOT / "bench" / "gpu"]
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
        "CUDA_LAUNCH_BLOCKING": "1" if stage.blocking else "0",
    }


def native_library(folder: Path) -> str:
    """What was done for the compiled CPU kernels: they are found, or built into the checkout with the compiler that is there."""
    found = subprocess.run(
        [sys.executable, "-c", "from pecker_kernels import native; print(native.available())"],
        env=environment(Stage("", "")), capture_output=True, text=True,
    )  # fmt: skip
    if found.stdout.strip() == "True":
        return "found"
    build = folder / "build"
    library = ROOT / "kernels" / "pecker_kernels" / "_native" / "libpecker_cpu.so"
    try:
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build)], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", str(build), "-j", "8"], check=True, capture_output=True)
        library.parent.mkdir(exist_ok=True)
        library.write_bytes((build / library.name).read_bytes())
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not there, and not built: {error}"
    return "built"


def run(stages: list[Stage], folder: Path, seconds: float) -> bool:
    """Whether all stages passed."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).unlink(missing_ok=True)
    put(folder, native_library=native_library(folder))
    passed = True
    for stage in stages:
        left = seconds - (time.perf_counter() - start)
        if left < LEAST_S:
            put(folder, stage=stage.name, skipped="no time left")
            passed = False
            continue
        begun, rc = time.perf_counter(), _run(stage, folder, min(stage.limit_s, left))
        put(folder, stage=stage.name, rc=rc, s=round(time.perf_counter() - begun, 1))
        passed = passed and rc == 0
    return passed


def _run(stage: Stage, folder: Path, limit_s: float) -> int | str:
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "stages.py"), str(folder), stage.run, *stage.words]
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n===== {stage.name}\n")
        log.flush()
        process = subprocess.Popen(
            command, env=environment(stage), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own children too
            process.wait()
            return "out of time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="", help="names with commas between; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--seconds", type=float, default=540, help="for all stages together")
    options = parser.parse_args()
    try:
        stages = chosen(options.stages)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("BENCH_SCALE") != "tiny":
        ask = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
        if subprocess.run([sys.executable, "-c", ask]).returncode:
            print("error: torch finds no CUDA device here; BENCH_SCALE=tiny is a dry run without one", file=sys.stderr)
            return 2
    return 0 if run(stages, options.output.resolve(), options.seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
