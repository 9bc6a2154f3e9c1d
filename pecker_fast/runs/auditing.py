"""`audit`: a run's result, or any model folder, with its controls, under the probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pecker_fast import files
from pecker_fast.audit import (
    AUDIT,
    BEFORE,
    NEVER,
    PROBES,
    RELABEL,
    RESULT,
    Audit,
    AuditTicker,
    ClassWorld,
    Scene,
    Subject,
    World,
    budget_of,
    relabelled,
    said_otherwise,
    text_world,
)
from pecker_fast.conditions import read_prompts
from pecker_fast.errors import ModelError, OutputError, RecipeError, memory_errors
from pecker_fast.evaluate import Judge, WordJudge, load_second_judge
from pecker_fast.loading import Model, fit_timesteps, load_model, pick_device, plan_of, start_generator
from pecker_fast.machine import StopFlag
from pecker_fast.networks import TextDenoiser, one_step_start
from pecker_fast.recipe import Recipe, known
from pecker_fast.records import RECIPE, locked
from pecker_fast.report import write_report
from pecker_fast.runs.held import BASE_KEYS, base_model, load_run, trained_generator
from pecker_fast.runs.result import RunResult
from pecker_fast.terminal import note

WORDS = "given words"  # how prompts of a file are called
STOPPED = "what is found so far is in {}; the same command goes on"


@dataclass(frozen=True)
class Asked:
    """What an audit is asked for. against: runs or models that never knew the concept. prompts: a file that says the concept
    in other words. seed: of all its draws. controls_of: a run whose audit had the very same controls, which are taken over."""

    probes: Sequence[str] = ()
    budget: str = "standard"
    against: Sequence[str] = ()
    samples: int | None = None
    seed: int = 0
    prompts: str | None = None
    second_judge: str | None = None
    controls_of: str | None = None

    def names(self) -> list[str]:
        """The probes in their order, all of them where none is named. Raises RecipeError."""
        for name in self.probes:
            known("probes", name, PROBES)
        return [name for name in PROBES if name in self.probes or not self.probes]

    def controls(self) -> Path | None:
        """The audit.json of `controls_of`. Raises OutputError where it has none."""
        if self.controls_of is None:
            return None
        path = Path(self.controls_of) / AUDIT
        if not path.is_file():
            raise OutputError(f"--controls-of: {path} is not there; audit that run first")
        return path


@memory_errors("use a smaller --budget, or free memory")
def audit_run(
    what: str | Path,
    asked: Asked,
    recipe: Recipe | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
    locks: bool = True,
) -> dict[str, Any]:
    """Audit a run folder, or, with a recipe that says what was to be forgotten and of which model, any model's folder.

    output: folder of audit.json and the images; None = the run's own; of a model's folder none is written without.
    locks: others are kept from writing there; false where the caller holds the run.

    Returns the record (docs/audit.md). Raises RecipeError, ModelError, OutputError, CheckpointError and, after a signal,
    Interrupted: what was found so far is on disk, and the same call goes on.
    """
    names, folder, into = asked.names(), Path(what), Path(output) if output is not None else None
    into = folder if into is None and (folder / RECIPE).is_file() else into
    scene, subjects = staged(what, asked, recipe)
    with StopFlag() as stop, AuditTicker(quiet) as ticker, _holding(into if locks else None):
        audit = Audit(scene, subjects, names, into, {"of": str(what)}, ticker.told, asked.controls())
        with stop.at_once(STOPPED.format(into / AUDIT) if into is not None else "nothing is kept without --output"):
            return audit.run()


def staged(what: str | Path, asked: Asked, recipe: Recipe | None = None) -> tuple[Scene, dict[str, Subject]]:
    """(the scene, the result and its controls by name) of an audit, on the device. Raises as `audit_run`."""
    budget = budget_of(asked.budget, asked.samples)
    if (Path(what) / RECIPE).is_file():
        if recipe is not None:
            raise RecipeError("--recipe: a run folder has its own; leave it out")
        recipe, model, result = _of_run(Path(what), asked)
    elif recipe is None:
        raise OutputError(
            f"{what}: not a run folder (no {RECIPE}); to audit another model's folder, say with --recipe what it was to forget"
        )
    else:
        recipe, model, result = _of_folder(str(what), recipe, asked)
    before, device = _start(recipe, model, result), pick_device()
    forget, cover = _named(model)
    subjects = {RESULT: result, BEFORE: before, RELABEL: relabelled(before, forget, cover)}
    for number, other in enumerate(asked.against):
        name = NEVER if number == 0 else f"{NEVER} {number + 1}"
        subjects[name] = _never(recipe, model, result, other)
    subjects = {name: subject.with_network(subject.network.to(device)) for name, subject in subjects.items()}
    world = _world(recipe, model, asked)
    return Scene(world, subjects[BEFORE], budget, asked.seed, _said(model, asked), forget, cover), subjects


@contextmanager
def _holding(folder: Path | None) -> Iterator[None]:
    """Nobody else writes into the folder: a run's, or one of the audit's own, which is made. Raises OutputError."""
    if folder is None:
        yield
    elif (folder / RECIPE).is_file():
        with locked(folder):
            yield
    else:
        with files.held(folder):
            yield


def check_audit(recipe: Recipe, model: Model) -> None:
    """Raise RecipeError or ModelError, before anything is trained, where the audit that the recipe asks for could not be made."""
    if recipe.audit.budget == "none":
        return
    if recipe.distill_steps:
        raise RecipeError(
            "audit.budget: a run that distils its own start keeps nothing to compare with; use audit.budget=none, or a generator"
        )
    asked = _asked_by(recipe, model)
    asked.names()
    _world(recipe, model, asked)


def with_audit(recipe: Recipe, model: Model, result: RunResult, quiet: bool) -> RunResult:
    """The result of a run on this model, whose folder is held, with the audit that its recipe asks for, taken up where it was
    left. Raises Interrupted."""
    if recipe.audit.budget == "none" or result.metrics is None:
        return result
    asked = _asked_by(recipe, model, told=True)
    found = audit_run(result.run_dir, asked, quiet=quiet, locks=False)
    return replace(result, audit=found, report=write_report(result.run_dir))


def _asked_by(recipe: Recipe, model: Model, told: bool = False) -> Asked:
    """What a recipe asks for. Of its models those are left out, and told, that knew what is forgotten here or are no twins of this
    model: a shipped recipe names one, and may be given any model and anything to forget."""
    options, fitting = recipe.audit, []
    for name in options.against:
        doubt = (
            None if (Path(name) / RECIPE).is_file() else _doubt(model, files.resolve_model(name), name, recipe.one_step)
        )
        if doubt is None:
            fitting.append(name)
        elif told:
            note([f"audit.against: {name} is left out: {doubt}"])
    return Asked(tuple(options.probes), options.budget, tuple(fitting), options.samples or None)


def _doubt(model: Model, folder: Path, name: str, one_step: bool) -> str | None:
    """Why a folder's model cannot be compared with; None where it can."""
    try:
        _check_like(model, folder, name, one_step)
    except ModelError as error:
        return str(error)
    return _knows(model, folder)


Found = tuple[Recipe, Model, Subject]


def _of_run(folder: Path, asked: Asked) -> Found:
    """(recipe, the model it began with, the result) of a run."""
    run = load_run(folder)
    if run.recipe.distill_steps:
        raise RecipeError(
            f"{folder}: this run distilled its own start, which is not kept, so there is nothing to compare with"
        )
    model = base_model(run, _further(run.located(BASE_KEYS), asked))
    recipe = fit_timesteps(run.located(BASE_KEYS), model.teacher.schedule.num_timesteps)
    t_init = recipe.timesteps.init if recipe.one_step else None
    return recipe, model, _subject(RESULT, trained_generator(run, model), t_init, recipe)


def _of_folder(what: str, recipe: Recipe, asked: Asked) -> Found:
    """The same of any model's folder: one step where it says so of itself, many where not."""
    more = _further(recipe, asked)
    model = load_model(recipe, more)
    recipe = fit_timesteps(recipe, model.teacher.schedule.num_timesteps)
    folder = files.resolve_model(what)
    distilled = (folder / "generator").is_dir()
    t_init = recipe.timesteps.init if distilled else one_step_start(folder, recipe.timesteps.init)
    network = start_generator(recipe.model_copy(update={"generator": what}), model.teacher).freeze()
    return recipe, model, _subject(RESULT, network, t_init, recipe)


def _subject(role: str, network: Any, t_init: int | None, recipe: Recipe) -> Subject:
    if t_init is not None:
        return Subject(role, network, t_init)
    return Subject(role, network, None, recipe.evaluate.teacher_steps, recipe.guidance.teacher)


def _start(recipe: Recipe, model: Model, result: Subject) -> Subject:
    """The model before: what a one-step result started from, or the denoiser itself."""
    if result.t_init is None:
        return _subject(BEFORE, model.teacher, None, recipe)
    return _subject(BEFORE, start_generator(recipe, model.teacher).freeze(), result.t_init, recipe)


def _never(recipe: Recipe, model: Model, result: Subject, name: str) -> Subject:
    """A model that never knew: a run's result, or a model folder's generator (of a denoiser its UNet). Raises ModelError."""
    if (Path(name) / RECIPE).is_file():
        run = load_run(name)
        return _subject(NEVER, trained_generator(run, base_model(run)), result.t_init, recipe)
    folder = files.resolve_model(name)
    if (doubt := _knows(model, folder)) is not None:
        raise RecipeError(f"against {name}: {doubt}")
    _check_like(model, folder, name, result.t_init is not None)
    distilled = (folder / "generator").is_dir()
    given: dict[str, Any] = {"model": name, "generator": name if distilled and result.t_init is not None else None}
    given |= {"config_folder": None, "revision": None, "null_class": model.teacher.null_class}
    if model.text is not None:
        given["null_class"] = recipe.null_class
    other = recipe.model_copy(update={**given, "evaluate": recipe.evaluate.model_copy(update={"judge": None})})
    table = model.teacher.table.prompts if isinstance(model.teacher, TextDenoiser) else ()
    loaded = load_model(other, table, result=not distilled)
    network = loaded.teacher if given["generator"] is None else start_generator(other, loaded.teacher)
    if isinstance(network, TextDenoiser) and network.table.prompts != table:
        raise ModelError(f"against {name}: its prompts are others than the model's")
    if network.sample_shape != model.teacher.sample_shape:
        raise ModelError(
            f"against {name}: its samples are {network.sample_shape}, the model's {model.teacher.sample_shape}"
        )
    if (
        network.schedule.num_timesteps < model.teacher.schedule.num_timesteps
    ):  # an exported one-step result's ends at t_init
        network.schedule = model.teacher.schedule
    return _subject(NEVER, network.freeze(), result.t_init, recipe)


def _check_like(model: Model, folder: Path, name: str, one_step: bool) -> None:
    """Raise ModelError where a folder's network is no twin of the model's, by the headers of its weights."""
    distilled = (folder / "generator").is_dir()
    if one_step and not distilled and one_step_start(folder, 0) is None:
        raise ModelError(
            f"against {name}: it has no one-step generator (generator/), and the result is one; distil it first"
        )
    found = files.empty_weights(folder / "generator" if distilled and one_step else files.check_model_folder(folder))
    for key, p in model.teacher.named_parameters():
        if key not in found or found[key].shape != p.shape:
            raise ModelError(f"against {name}: its network is another model's (tensor {key}); give a twin of this one")


def _knows(model: Model, folder: Path) -> str | None:
    """One line where a model's own card says that it was made without something else than what is forgotten; None where not, or
    where it says nothing of that."""
    card = files.read_json(folder / "model.json", error=ModelError) if (folder / "model.json").is_file() else {}
    without = card.get("without") if isinstance(card, dict) else None
    if not isinstance(without, list) or not without:
        return None
    concepts = model.text.plan.concepts if model.text is not None else ()
    forgotten = [str(c) for c in model.conditions.forget] if model.text is None else [name for name, _ in concepts]
    known = [one for one in forgotten if one.casefold() not in {str(gone).casefold() for gone in without}]
    if not known:
        return None
    never = ", ".join(map(str, without[:8]))
    return f"it was made without {never}, and knows {known[0]}; give one made with `pretrain … --without {known[0]}`"


def _named(model: Model) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All rows that name what is forgotten, and what is drawn in their place."""
    c = model.conditions
    if model.text is None:
        return c.forget, c.cover
    judged = model.text.judged
    return (*c.forget, *judged.forget), (*c.cover, *judged.cover)


def _world(recipe: Recipe, model: Model, asked: Asked) -> World:
    """Raises RecipeError where nothing can judge."""
    c, null = model.conditions, model.teacher.null_class
    beside = asked.second_judge or _beside_judge(recipe, model)
    second = load_second_judge(beside) if beside is not None else None
    if model.text is None:
        if model.judge is None:
            raise RecipeError(
                "audit: the model folder has no judge/, so nothing can tell what comes back; give evaluate.judge"
            )
        other = second if isinstance(second, Judge) else None
        return ClassWorld(c.forget, c.cover, c.retain, c.forget, c.retain, null, model.judge, other, model.reference)
    if model.words is None:
        raise RecipeError(
            "audit: the model folder has no judge of words, so nothing can tell what comes back; give evaluate.judge"
        )
    judged = model.text.judged
    assert isinstance(model.teacher, TextDenoiser)
    world = text_world(
        c.forget, c.cover, c.retain, (judged.forget, judged.cover, judged.retain), null, model.teacher.table.prompts,
        model.words, second if isinstance(second, WordJudge) else None,
    )  # fmt: skip
    if not world.forget or not world.judged:
        raise RecipeError("audit: the judge has no word for what is forgotten; give evaluate.judge, one that knows it")
    return world


def _beside_judge(recipe: Recipe, model: Model) -> str | None:
    """The folder whose second judge serves: beside the first."""
    if recipe.evaluate.judge is not None:
        return str(Path(recipe.evaluate.judge).parent)
    return str(model.configs)


def _further(recipe: Recipe, asked: Asked) -> tuple[str, ...]:
    """Prompts of the table beside those of the recipe: the concept in other words."""
    if not recipe.uses_prompts:
        if asked.prompts is not None:
            raise RecipeError("--prompts: this model draws from classes and reads no words")
        return ()
    plan, judged = plan_of(recipe, files.resolve_model(recipe.config_folder or recipe.model, recipe.revision))
    found = [prompt for prompts in _ways(plan.concepts, judged.forget, judged.cover).values() for prompt in prompts]
    given = read_prompts(asked.prompts).texts if asked.prompts is not None else ()
    return tuple(dict.fromkeys((*found, *given)))


def _ways(concepts: Sequence[tuple[str, str]], captions: Sequence[str], covers: Sequence[str]) -> dict[str, list[str]]:
    """Way -> prompts, of every concept that is named in words."""
    found: dict[str, list[str]] = {}
    for concept, _ in concepts:
        for way, prompts in said_otherwise(concept, captions, covers).items():
            found[way if len(concepts) == 1 else f"{concept}: {way}"] = prompts
    return found


def _said(model: Model, asked: Asked) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if model.text is None or not isinstance(model.teacher, TextDenoiser):
        return ()
    table, judged = model.teacher.table, model.text.judged
    captions, covers = ([table.prompts[row] for row in rows] for rows in (judged.forget, judged.cover))
    ways = _ways(model.text.plan.concepts, captions, covers)
    if asked.prompts is not None:
        ways[WORDS] = list(read_prompts(asked.prompts).texts)
    return tuple((way, table.index(prompts)) for way, prompts in ways.items())
