"""What an iteration and a mask of each finalist cost, all arms in turn in one process."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

from evidence import plan
from evidence.stages import best_config, results, tuned

ROUNDS = 15


def measure(runs: Path) -> None:
    """Writes `time.json`: {arm: {"iteration_ms": median, "mask_s": …}}. Wants a quiet machine."""
    from evidence import trial as trials

    found = tuned(runs) | {arm: best_config(result) for arm, result in results(runs, "one_stage_tuning").items()}
    timing: dict[str, dict[str, float]] = {}
    trials.Trial(plan.PAPER, next(iter(found.values())), plan.PAIRS[0], plan.TUNING_SEED).advance(2)  # warm
    running = {}
    for arm, config in found.items():
        trials._scores.cache_clear()
        start = time.perf_counter()
        trial = trials.Trial(arm, config, plan.PAIRS[0], plan.TUNING_SEED)
        made = time.perf_counter() - start
        start = time.perf_counter()
        trials.Trial(plan.NONE, config, plan.PAIRS[0], plan.TUNING_SEED)  # what loading alone takes
        timing[arm.name] = {"mask_s": max(0.0, made - (time.perf_counter() - start)) if arm != plan.NONE else 0.0}
        running[arm.name] = trial
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS):
        for name, trial in running.items():
            start = time.perf_counter()
            trial.advance(trial.state.step + 1)
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, values in times.items():
        timing[name]["iteration_ms"] = statistics.median(values[3:])
    (runs / "time.json").write_text(json.dumps(timing, indent=1) + "\n")
    print(json.dumps(timing, indent=1))
