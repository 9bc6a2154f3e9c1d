"""`compare`: one task, several methods, several seeds; a run for each, taken up where it was left, and one table of figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.errors import OutputError, PeckerError, RecipeError
from pecker_fast.forgetting import check_method
from pecker_fast.loading import load_model, start_generator
from pecker_fast.recipe import Recipe, known, load_recipe, methods
from pecker_fast.runs.held import BASE_KEYS, load_run
from pecker_fast.runs.start import train
from pecker_fast.runs.yardsticks import KINDS, NEVER, SLD, concepts, judged

COMPARISON = "compare.json"


@dataclass(frozen=True)
class Column:
    """One figure of a run. better: "↑", "↓" or "". form: how it is written, see report.compare."""

    key: str
    name: str
    better: str = ""
    form: str = "number"


COLUMNS = (
    Column("ua", "UA", "↑", "share"),
    Column("cover_rate", "cover", "↑", "share"),
    Column("retain_accuracy", "kept", "↑", "share"),
    Column("neighbour_loss", "worst kept word or class", "↓", "points"),
    Column("fid_ratio", "FID / teacher's", "↓", "times"),
    Column("precision", "precision", "↑", "share"),
    Column("recall", "recall", "↑", "share"),
    Column("recovery", "comes back (condition)", "↓", "share"),
    Column("relearn", "relearnt", "↓", "share"),
    Column("training_s", "training", "↓", "seconds"),
    Column("images", "images", "↓", "count"),
    Column("flops", "FLOPs", "↓", "flops"),
    Column("peak_memory_bytes", "peak memory", "↓", "bytes"),
    Column("moved", "weights moved", "", "share"),
    Column("verdict", "audit", "", "text"),
)


def compare(
    source: str | Path,
    names: Sequence[str],
    *,
    seeds: int = 1,
    output: str | Path = "runs/compare",
    overrides: Sequence[str] = (),
    never: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Train the recipe's task by each of the methods with seeds 0 … seeds − 1 and put their figures beside each other.

    source: a recipe, each method takes its own settings for it (`load_recipe`); overrides: `key=value`, of all methods alike.
    output: a folder; every run has one of its own in it, METHOD-SEED, and is taken up, or left as it is where it is finished.
    names may have `sld`, sampling that is steered away from the concept; never: a model that never knew what is forgotten, one row
    more. Both are judged once, and nothing is trained for them.
    Returns what compare.json holds. Raises RecipeError, and whatever a run raises.
    """
    if not names:
        raise RecipeError("--methods: give at least one, such as pecker,spare")
    if seeds < 1:
        raise RecipeError(f"--seeds: {seeds}; give at least 1")
    for name in names:
        known("--methods", name, [*methods(), SLD])
    folder, yardsticks = Path(output), [SLD] * (SLD in names) + [NEVER] * (never is not None)
    task = recipe_of(source, _many_steps(names), 0, folder, overrides) if yardsticks else None
    if task is not None and SLD in yardsticks:
        concepts(task)
    recipes = [
        (name, seed, recipe_of(source, name, seed, folder, overrides))
        for name in dict.fromkeys(names)
        if name != SLD
        for seed in range(seeds)
    ]
    for _, _, recipe in recipes:  # before the first of them is trained
        check_method(recipe)
    runs = []
    for number, (name, seed, recipe) in enumerate(recipes, 1):
        say(f"{number}/{len(recipes)}: {name}, seed {seed}")
        train(recipe, quiet=True)
        runs.append({"method": name, "seed": seed, "run": recipe.output, **figures_of(Path(recipe.output))})
    teacher = None  # of all yardsticks alike
    for name in yardsticks:
        assert task is not None
        say(f"{name}: judged")
        place = folder / name.replace(" ", "-")
        figures = judged(task, name, never, place, teacher)
        teacher = figures["teacher"]
        blank = dict.fromkeys(column.key for column in COLUMNS)
        runs.append({"method": name, "seed": 0, "run": str(place), **blank, **shares_of(task, figures)})
    found = {"task": str(source), "overrides": list(overrides), "runs": runs, "rows": rows_of(runs)}
    files.make_folder(folder)
    files.write_json(folder / COMPARISON, found)
    return found


def _many_steps(names: Sequence[str]) -> str:
    """A method whose recipe draws in many steps, as yardsticks do."""
    return next((name for name in names if name != SLD and not methods()[name].one_step), "spare")


def recipe_of(source: str | Path, name: str, seed: int, folder: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of one run. Raises RecipeError."""
    taken = [one for one in overrides if one.partition("=")[0] in ("method", "seed", "output", "resume")]
    if taken:
        raise RecipeError(f"override {taken[0]}: compare chooses it itself; leave it out")
    own = [f"method={name}", f"seed={seed}", f"output={folder / f'{name}-{seed}'}"]
    return load_recipe(source, [*own, *overrides])


def figures_of(run: Path) -> dict[str, Any]:
    """The figures of a finished run by column; None where it has none. Raises OutputError."""
    path = run / "metrics.json"
    if not path.is_file():
        raise OutputError(f"{run}: the run is not finished; the same command goes on")
    metrics = files.read_json(path)
    cost = metrics.get("cost") or {}
    audit = files.read_json(run / "audit.json") if (run / "audit.json").is_file() else {}
    return {
        **shares_of(load_run(run).recipe, metrics),
        "recovery": _recovery(audit, "condition"),
        "relearn": _recovery(audit, "relearn"),
        **{key: cost.get(key) for key in ("training_s", "images", "flops", "peak_memory_bytes")},
        "moved": moved(run),
        "verdict": audit.get("verdict"),
    }


def shares_of(recipe: Recipe, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of `after` what it draws, beside `teacher`."""
    after, teacher = (metrics.get(key) or {} for key in ("after", "teacher"))
    fid, reference = after.get("fid"), teacher.get("fid")
    return {
        **{key: after.get(key) for key in ("ua", "cover_rate", "retain_accuracy", "precision", "recall")},
        "neighbour_loss": neighbour_loss(recipe, after, teacher),
        "fid_ratio": fid / reference if fid is not None and reference else None,
    }


def neighbour_loss(recipe: Recipe, after: Mapping[str, Any], teacher: Mapping[str, Any]) -> float | None:
    """How many points the kept class, or word, that has lost most has lost against the teacher; None where it is not known."""
    mine, theirs = after.get("per_class") or {}, teacher.get("per_class") or {}
    gone = {str(c) for c in (recipe.forget if isinstance(recipe.forget, list) else [recipe.forget])}
    if recipe.uses_prompts:
        # a judge of words knows the forgotten one by what it was seen as before
        gone = {word for word in theirs if mine.get(word, 0) < 0.5 * theirs[word] and word in str(recipe.forget)}
    losses = [theirs[word] - mine[word] for word in mine if word in theirs and word not in gone]
    return max(losses, default=None)


def _recovery(audit: Mapping[str, Any], probe: str) -> float | None:
    found = audit.get("probes", {}).get(probe, {}).get("figures", {}).get("result", {}).get("recovery")
    return None if found is None else float(found)


def moved(run: Path) -> float | None:
    """Share of the network's weights that are not as θ began any more; None where that is gone, or was distilled in the run."""
    opened = load_run(run)
    if opened.recipe.distill_steps:
        return None
    try:
        recipe = opened.located(BASE_KEYS)
        start = start_generator(recipe, load_model(recipe).teacher)
        now = files.read_weights(opened.pipeline / "unet")
    except PeckerError:
        return None
    changed = total = 0
    for name, old in start.named_parameters():
        total += old.numel()
        changed += int((old.float() != now[name].float()).sum())
    return changed / max(total, 1)


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method: of every figure {"mean", "low", "high", "n"} over its seeds, of texts the commonest."""
    rows = []
    for name in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == name]
        kind = KINDS[name] if name in KINDS else methods()[name].kind
        row: dict[str, Any] = {"method": name, "result": kind, "seeds": len(of_method)}
        for column in COLUMNS:
            values = [run[column.key] for run in of_method if run[column.key] is not None]
            row[column.key] = _summary(values, column.form == "text")
        rows.append(row)
    return rows


def _summary(values: Sequence[Any], text: bool) -> Any:
    if not values:
        return None
    if text:
        return max(dict.fromkeys(values), key=values.count)
    mean = statistics.fmean(values)
    return {"mean": mean, "low": min(values), "high": max(values), "n": len(values)}
