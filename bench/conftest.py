"""What a result file says of the machine: kind and versions, not its name; and the command, without the raw timings."""

import os
import re
import sys
from pathlib import Path

from pecker_fast.machine.hardware import environment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernels"))  # the gates of what is timed
STATS = ("min", "max", "mean", "stddev", "median", "iqr", "rounds", "iterations")  # all but the raw timings


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment())


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    scale = os.environ.get("BENCH_SCALE", "full")
    arguments = [a.replace(f"{ROOT}{os.sep}", "") for a in map(str, config.invocation_params.args)]
    # Where else the file was put is the machine's business.
    arguments = [re.sub(r"^(--benchmark-json=)/.*/", r"\1", a) for a in arguments]
    output_json["command"] = " ".join([*([f"BENCH_SCALE={scale}"] if scale != "full" else []), "pytest", *arguments])
    output_json["scale"] = scale
    for entry in output_json["benchmarks"]:
        del entry["options"], entry["params"]
        entry["stats"] = {key: value for key, value in entry["stats"].items() if key in STATS}


def pytest_terminal_summary(terminalreporter):
    import deepspeed_adam
    from adam_contenders import DEVICE

    if deepspeed_adam.installed() and not deepspeed_adam.built(DEVICE):
        terminalreporter.write_line("left out: DeepSpeed's Adam, which only `make bench` compiles")
