"""The stages: screening by successive halving, refinement, finals, relearning, one-stage. Every run leaves a JSON file
that a later call takes up, so that the study goes on where it was stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evidence import plan
from evidence.plan import Arm, Config

Task = tuple[str, str, dict[str, Any]]  # kind, file name, arguments
Result = dict[str, Any]


def run_stage(name: str, runs: Path, jobs: int) -> list[Result]:
    """Run what is missing of a stage and return all its results."""
    tasks = STAGES[name](runs)
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [task for task in tasks if not (folder / f"{task[1]}.json").is_file()]
    print(f"{name}: {len(tasks)} runs, {len(missing)} to do", flush=True)
    if missing:
        # One thread a run: figures then depend neither on the number of jobs nor on what else the machine does.
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            for line in pool.map(_execute, [(task, str(folder)) for task in missing]):
                print(line, flush=True)
    return [read(folder / f"{task[1]}.json") for task in tasks]


def read(path: Path) -> Result:
    result: Result = json.loads(path.read_text())
    return result


def _execute(job: tuple[Task, str]) -> str:
    (kind, name, arguments), folder = job
    start = time.perf_counter()
    result = KINDS[kind](**arguments) | {"seconds": round(time.perf_counter() - start, 1)}
    path = Path(folder) / f"{name}.json"
    path.with_suffix(".part").write_text(json.dumps(result) + "\n")
    os.replace(path.with_suffix(".part"), path)
    return f"{Path(folder).name} {name}: {result.get('summary', '')} ({result['seconds']:.0f} s)"


# -- kinds of run -------------------------------------------------------------------------------------------------------


def halve(
    arm: dict[str, Any],
    configs: list[dict[str, Any]],
    rungs: list[list[int]],
    pair: list[int],
    seed: int,
) -> Result:
    """Successive halving over settings: at each rung the best by `objective` go on."""
    from evidence.trial import Trial, objective

    trials = [Trial(Arm(**arm), Config(**config), (pair[0], pair[1]), seed) for config in configs]
    start = trials[0].figures()
    reference = start["fid"] if arm["start"] == "two-stage" else 0.3  # an undistilled θ draws noise
    history: list[list[dict[str, float]]] = [[] for _ in trials]
    alive = list(range(len(trials)))
    for steps, keep in rungs:
        alive = sorted(alive, key=lambda i: history[i][-1]["objective"] if history[i] else 0.0)[:keep]
        for i in alive:
            trials[i].advance(steps)
            figures = trials[i].figures()
            history[i].append({**figures, "objective": objective(figures, reference)})
    best = min(alive, key=lambda i: history[i][-1]["objective"])
    last = history[best][-1]
    density = trials[0].mask.density if trials[0].mask is not None else 1.0
    return {
        "arm": arm, "configs": configs, "history": history, "best": best, "start": start, "density": density,
        "summary": f"lr {configs[best]['lr']:g}/{configs[best]['lr_score']:g} step {last['step']} UA {last['ua']:.3f} "
        f"cover {last['cover']:.3f} FID {last['fid']:.3f} J {last['objective']:.3f}",
    }  # fmt: skip


def follow(
    arm: dict[str, Any], config: dict[str, Any], pair: list[int], seed: int, steps: int, relearn: bool
) -> Result:
    """One run with figures on the way; then, if asked, how long until the class is back."""
    from evidence.trial import Trial

    trial = Trial(Arm(**arm), Config(**config), (pair[0], pair[1]), seed)
    history = [trial.figures()]
    for step in range(plan.JUDGE_EVERY, steps + 1, plan.JUDGE_EVERY):
        trial.advance(step)
        history.append(trial.figures())
    last = trial.figures(2000, 2000)
    result = {"arm": arm, "config": config, "pair": pair, "seed": seed, "history": history, "last": last}
    if relearn:
        result["relearn"] = trial.relearn()
    result["summary"] = f"UA {last['ua']:.3f} cover {last['cover']:.3f} FID {last['fid']:.3f}"
    return result


KINDS: dict[str, Callable[..., Result]] = {"halve": halve, "follow": follow}


# -- stages -------------------------------------------------------------------------------------------------------------


def _halving(arm: Arm, configs: tuple[Config, ...], rungs: tuple[tuple[int, int], ...]) -> Task:
    arguments = {
        "arm": asdict(arm), "configs": [c.as_dict() for c in configs], "rungs": [list(r) for r in rungs],
        "pair": list(plan.PAIRS[0]), "seed": plan.TUNING_SEED,
    }  # fmt: skip
    return "halve", arm.name, arguments


def _finals(arm: Arm, config: Config, seeds: dict[tuple[int, int], tuple[int, ...]], steps: int) -> list[Task]:
    tasks: list[Task] = []
    for pair, numbers in seeds.items():
        for seed in numbers:
            relearn = pair == plan.PAIRS[0] and seed < plan.RELEARN_SEEDS and arm.start == "two-stage"
            arguments = {
                "arm": asdict(arm), "config": config.as_dict(), "pair": list(pair), "seed": seed, "steps": steps,
                "relearn": relearn,
            }  # fmt: skip
            tasks.append(("follow", f"{arm.name}-{pair[0]}-{pair[1]}-seed{seed}", arguments))
    return tasks


def results(runs: Path, stage: str) -> dict[Arm, Result]:
    """Finished halvings of a stage, by arm."""
    found = [read(path) for path in sorted((runs / stage).glob("*.json"))]
    return {Arm(**result["arm"]): result for result in found if "best" in result}


def score_of(result: Result) -> float:
    """Objective of an arm's best settings at the last rung."""
    return float(result["history"][result["best"]][-1]["objective"])


def best_config(result: Result) -> Config:
    return Config(**result["configs"][result["best"]])


def finalists(runs: Path) -> list[Arm]:
    """At most 8 arms: no mask, the paper's, the best two structured ones of different scores, the best element mask; and the
    random twins of the paper's, of the best structured one and of the best element mask."""
    screened = results(runs, "screen")
    ranked = sorted(
        (arm for arm in screened if arm.score not in ("none", "random")), key=lambda a: score_of(screened[a])
    )
    structured = [arm for arm in ranked if arm.structure != "element"]
    best = structured[0]
    second = next(arm for arm in structured if arm.score != best.score)
    element = next(arm for arm in ranked if arm.structure == "element" and arm != plan.PAPER)
    chosen = [plan.NONE, plan.PAPER, plan.PAPER.twin(), best, best.twin(), second, element, element.twin()]
    return list(dict.fromkeys(chosen))


def _screen(runs: Path) -> list[Task]:
    return [_halving(arm, plan.CONFIGS, plan.RUNGS) for arm in plan.screened()]


def _refine(runs: Path) -> list[Task]:
    """An arm that was not screened (the random twin of a screened one) starts from its twin's best settings."""
    screened = results(runs, "screen")
    tasks = []
    for arm in finalists(runs):
        source = screened.get(arm) or next(r for a, r in screened.items() if a.twin() == arm)
        best = best_config(source)
        tasks.append(_halving(arm, (best, *plan.neighbours(best)), ((plan.REFINE_STEPS, 5),)))
    return tasks


def tuned(runs: Path) -> dict[Arm, Config]:
    """The arms of the finals with their settings: the refined ones, and the best of them with a mask from fewer samples."""
    refined = results(runs, "refine")
    arms = {arm: best_config(result) for arm, result in refined.items()}
    best = min((arm for arm in arms if arm.score not in ("none", "random")), key=lambda a: score_of(refined[a]))
    return arms | {replace(best, samples=plan.FEW_SAMPLES): arms[best]}


def _final(runs: Path) -> list[Task]:
    return [t for arm, config in tuned(runs).items() for t in _finals(arm, config, plan.SEEDS, plan.FINAL_STEPS)]


def one_stage_arms(runs: Path) -> list[Arm]:
    """No mask, the paper's, its random twin, and the best mask of all with its twin under the paper's rule: θ is still to be
    distilled, so that freezing the rest is no choice."""
    screened = results(runs, "screen")
    best = min(
        (arm for arm in finalists(runs) if arm.score not in ("none", "random")), key=lambda a: score_of(screened[a])
    )
    best = Arm(best.score, best.structure, best.density, "differentiated")
    arms = [plan.NONE, plan.PAPER, plan.PAPER.twin(), best, best.twin()]
    return [Arm(a.score, a.structure, a.density, a.rule, "one-stage") for a in dict.fromkeys(arms)]


def _one_stage_tuning(runs: Path) -> list[Task]:
    return [_halving(arm, plan.ONE_STAGE_CONFIGS, plan.ONE_STAGE_RUNGS) for arm in one_stage_arms(runs)]


def _one_stage(runs: Path) -> list[Task]:
    found = results(runs, "one_stage_tuning")
    return [
        t for arm, r in found.items() for t in _finals(arm, best_config(r), plan.ONE_STAGE_SEEDS, plan.ONE_STAGE_STEPS)
    ]


STAGES: dict[str, Callable[[Path], list[Task]]] = {
    "screen": _screen,
    "refine": _refine,
    "final": _final,
    "one_stage_tuning": _one_stage_tuning,
    "one_stage": _one_stage,
}
