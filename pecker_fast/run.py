"""A recipe from beginning to end: model, mask, loop, evaluation, export, report. The verbs of the library stand here."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast import hardware, io_safe
from pecker_fast.checkpoint import load_checkpoint, read_checkpoint_stage, save_checkpoint
from pecker_fast.config import Recipe, load_recipe, recipe_from
from pecker_fast.denoiser import Denoiser
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.engine.state import start_ema
from pecker_fast.errors import CheckpointError
from pecker_fast.evaluate import evaluate
from pecker_fast.evaluate.metrics import fid_floor
from pecker_fast.export import export_pipeline, write_unet
from pecker_fast.guard import StopFlag
from pecker_fast.loop import Losses, run_stage
from pecker_fast.methods import get_method
from pecker_fast.methods.updates import Dense, adam
from pecker_fast.parts import Parts, load_parts, pick_device
from pecker_fast.report import write_report
from pecker_fast.run_folder import BASE, MASK, METRICS, PIPELINE, open_run_folder, trajectory_sha256
from pecker_fast.saliency import make_mask
from pecker_fast.sample import ddim_sample, grid_labels, one_step_sample, save_grid
from pecker_fast.track import Tracker

GRID_COLUMNS = 8
GRID_SEED = 7
EVALUATION_SEED = 1_000_003  # apart from every training seed a user is likely to choose


@dataclass(frozen=True)
class RunResult:
    """What `train` leaves: the run folder, its metrics (None when nothing was judged) and the report."""

    run_dir: Path
    metrics: dict[str, Any] | None
    report: Path | None


def train(recipe: Recipe, *, tensorboard: bool = False, quiet: bool = False, dry_run: bool = False) -> RunResult:
    """Run a recipe in its output folder, from where it stopped (`resume`). Raises PeckerError with nothing lost.

    dry_run loads and checks everything, and writes nothing.
    """
    started = time.perf_counter()
    get_method(recipe.method)
    parts = load_parts(recipe)
    forget_images = _forget_images(recipe, parts)
    if dry_run:
        return RunResult(Path(recipe.output), None, None)
    checkpoint = open_run_folder(recipe)
    with Tracker(recipe.output, tensorboard, "none" if quiet else "auto") as tracker, StopFlag() as stop:
        return Training(recipe, parts, tracker, stop, forget_images, started).run(checkpoint)


def unlearn(
    model: Any,
    forget: int | list[int],
    cover: int | list[int],
    retain: list[int] | None = None,
    method: str = "pecker",
    output: str | Path = "runs/unlearn",
    recipe: str | Path | Recipe | None = None,
    quiet: bool = True,
    **keys: Any,
) -> RunResult:
    """Make a class-conditional diffusion model forget classes, from Python.

    model: shipped name, diffusers folder, hub name, or an object with `.unet` and `.scheduler` (a diffusers pipeline).
    recipe: what the other settings come from (name, file or Recipe); keys: recipe keys, sections as dicts.
    Raises PeckerError subclasses, one line each.
    """
    if not isinstance(model, str | Path):
        model = _write_base(model, Path(output) / BASE)
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    given = {"model": str(model), "forget": forget, "cover": cover, "retain": retain, "method": method, "output": str(output), **keys}
    data = base.model_dump(by_alias=True)
    for key, value in given.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return train(recipe_from(data, "unlearn"), quiet=quiet)


def distill(
    folder: Path, *, steps: int, seed: int, keys: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, quiet: bool = False
) -> None:
    """Put a distilled one-step generator beside the teacher: `generator/` (averaged θ) and `score/` (ψ), all classes.

    keys: further recipe keys (lr, ema, ...); dtype: what the weights are stored as.
    """
    run_dir = folder / ".distill"
    given = {"model": str(folder), "method": "sfd", "steps": 0, "distill_steps": steps, "seed": seed, "output": str(run_dir)}
    recipe = recipe_from({**given, "evaluate": {"every": 0, "final": 0}, **(keys or {})}, "distill")
    parts = load_parts(recipe)
    checkpoint = open_run_folder(recipe)
    with Tracker(run_dir, console="none" if quiet else "auto") as tracker, StopFlag() as stop:
        training = Training(recipe, parts, tracker, stop, None, time.perf_counter())
        state = training.distilled(checkpoint)
    for name, network in (("generator", state.averaged_generator()), ("score", state.score)):
        write_unet(network, folder / name, dtype)
    shutil.rmtree(run_dir)


class Training:
    """One run: the state as it moves through the stages, and the callbacks that watch it."""

    def __init__(
        self, recipe: Recipe, parts: Parts, tracker: Tracker, stop: StopFlag, forget_images: Callable | None, started: float
    ) -> None:
        self.recipe, self.parts, self.tracker, self.stop = recipe, parts, tracker, stop
        self.forget_images, self.started = forget_images, started
        self.device = pick_device()
        self.engine = LocalEngine(recipe, parts.conditions, self.device)
        self.run_dir = Path(recipe.output)
        self.identity = {"recipe_sha256": trajectory_sha256(recipe), "base_sha256": parts.base_sha256}
        self.saved_step: int | None = None
        self.metrics: dict[str, Any] = {"before": None, "after": None, "teacher": None}

    # -- stages -------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Path | None) -> RunResult:
        state, total = self.resume(checkpoint) if checkpoint else (self.start(), self.recipe.distill_steps + self.recipe.steps)
        if checkpoint and (self.run_dir / METRICS).is_file():
            self.metrics = io_safe.read_json(self.run_dir / METRICS)
            if self.metrics["after"] is not None and self.total_step(state) >= total:
                self.tracker.say(f"{self.run_dir}: this run is finished; resume=never runs it again")
                return RunResult(self.run_dir, self.metrics, write_report(self.run_dir))
        self.log_start(checkpoint, state)
        if state.stage == "distill":
            self.iterate(state, self.recipe.distill_steps)
            state = self.enter_forget(state)
        elif checkpoint is None:
            state = self.enter_forget(state)
        self.iterate(state, self.recipe.steps)
        return self.finish(state)

    def distilled(self, checkpoint: Path | None) -> TrainState:
        """The plain distillation stage alone."""
        state = self.resume(checkpoint)[0] if checkpoint else self.start()
        self.log_start(checkpoint, state)
        self.iterate(state, self.recipe.distill_steps)
        return state

    def start(self) -> TrainState:
        """φ, ψ, θ on the device, in the first stage the recipe has."""
        parts = self.parts
        teacher, score, generator = (d.to(self.device) for d in (parts.teacher, parts.score, parts.generator))
        stage = "distill" if self.recipe.distill_steps else "forget"
        return TrainState(
            teacher, score, generator, adam(self.recipe, score.named_parameters(), self.recipe.lr.score),
            Dense(self.recipe, generator.named_parameters(), None), start_ema(generator, self.recipe.ema), stage=stage,
        )  # fmt: skip

    def resume(self, checkpoint: Path) -> tuple[TrainState, int]:
        """The state of a checkpoint and the step it ends at."""
        state = self.start()
        state.stage, mask = read_checkpoint_stage(checkpoint)
        if state.stage == "forget":
            state.updates = get_method(self.recipe.method).updates(self.recipe, state.generator.named_parameters(), mask)
        load_checkpoint(state, checkpoint, self.identity)
        self.saved_step = self.total_step(state)
        return state, self.recipe.distill_steps + self.recipe.steps

    def enter_forget(self, state: TrainState) -> TrainState:
        """From the distilled (or given) θ to the forget stage: average becomes θ, ψ stays, mask, fresh optimizers."""
        recipe = self.recipe
        generator = state.averaged_generator() if state.stage == "distill" else state.generator
        generator.unet.requires_grad_(True)
        fresh = TrainState(
            state.teacher, state.score, generator, adam(recipe, state.score.named_parameters(), recipe.lr.score),
            state.updates, start_ema(generator, recipe.ema),
            images=state.images, training_s=state.training_s, flops=state.flops, flops_per_iteration=state.flops_per_iteration,
        )  # fmt: skip
        self.judge_start(fresh)
        mask = self.timed_mask(fresh) if get_method(recipe.method).uses_mask else None
        fresh.updates = get_method(recipe.method).updates(recipe, generator.named_parameters(), mask)
        self.log_mask(fresh)
        return fresh

    def iterate(self, state: TrainState, steps: int) -> None:
        self.tracker.progress(state.stage, steps, self.total_step(state) - state.step)
        callbacks = (self.log_step, self.evaluate_in_loop, self.checkpoint)
        run_stage(self.recipe, self.engine, state, steps, self.refresh, callbacks, self.stop, self.save)

    # -- mask ---------------------------------------------------------------------------------------------------

    def timed_mask(self, state: TrainState) -> Any:
        """A mask at the present weights; its time and FLOPs count as training."""
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter, self.engine.autocast():
            mask = make_mask(
                self.recipe, state.teacher, state.score, state.generator, self.parts.conditions, state.step, self.forget_images
            )
        state.training_s += time.perf_counter() - start
        state.flops += counter.get_total_flops()
        return mask

    def refresh(self, state: TrainState) -> None:
        state.updates.set_mask(self.timed_mask(state))
        self.log_mask(state)

    def log_mask(self, state: TrainState) -> None:
        mask = state.mask
        if mask is None:
            return
        mask.save(self.run_dir / MASK)
        self.tracker.event(
            "mask", self.total_step(state), source=self.recipe.mask.source, density=mask.density, count=mask.count,
            total=mask.total, threshold=mask.threshold,
        )  # fmt: skip

    # -- callbacks ----------------------------------------------------------------------------------------------

    def total_step(self, state: TrainState) -> int:
        return state.step + (self.recipe.distill_steps if state.stage == "forget" else 0)

    def log_start(self, checkpoint: Path | None, state: TrainState) -> None:
        resumed = self.total_step(state) if checkpoint else None
        self.tracker.event("start", self.total_step(state), **hardware.environment(), **self.identity, resumed_from=resumed)

    def log_step(self, state: TrainState, losses: Losses) -> None:
        if state.step % 10 and state.step > 1:
            self.tracker.tick(self.total_step(state))
            return
        values = {name: float(loss) for name, loss in losses.items()}
        rate = state.images / max(state.training_s, 1e-9)
        self.tracker.event(
            "step", self.total_step(state), stage=state.stage, **values, images=state.images, images_per_s=rate
        )

    def evaluate_in_loop(self, state: TrainState, losses: Losses) -> None:
        every = self.recipe.evaluate.every
        if state.stage == "forget" and every and state.step % every == 0 and self.parts.judge is not None:
            result = self.judge(self.one_step(state.averaged_generator()), self.recipe.evaluate.samples)
            self.tracker.event("evaluate", self.total_step(state), **_without(result, "per_class"))

    def checkpoint(self, state: TrainState, losses: Losses) -> None:
        every = self.recipe.checkpoint.every
        if every and state.step % every == 0:
            self.save(state)

    def save(self, state: TrainState) -> Path:
        self.saved_step = step = self.total_step(state)
        folder = save_checkpoint(state, self.run_dir, step, self.identity, self.recipe.checkpoint.keep)
        self.tracker.event("checkpoint", step, path=str(folder.relative_to(self.run_dir)))
        return folder

    # -- judging and writing ------------------------------------------------------------------------------------

    def one_step(self, generator: Denoiser) -> Callable[[torch.Tensor, int], torch.Tensor]:
        return lambda labels, seed: one_step_sample(generator, labels, seed, self.recipe.timesteps.init)

    def multi_step(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        steps = self.recipe.evaluate.teacher_steps
        return lambda labels, seed: ddim_sample(self.parts.teacher, labels, steps, seed)

    def judge(self, sampler: Callable, samples: int) -> dict[str, Any]:
        parts = self.parts
        assert parts.judge is not None
        c = parts.conditions
        return evaluate(sampler, parts.judge, parts.reference, list(c.forget), list(c.cover), list(c.retain), samples, EVALUATION_SEED)

    def grid(self, name: str, sampler: Callable) -> None:
        classes = sorted((*self.parts.conditions.forget, *self.parts.conditions.retain))
        save_grid(sampler(grid_labels(classes, GRID_COLUMNS), GRID_SEED), GRID_COLUMNS, self.run_dir / "samples" / f"{name}.png")

    def judge_start(self, state: TrainState) -> None:
        """`before`: θ as forgetting finds it. Kept in metrics.json at once, since a resumed run cannot make it again."""
        sampler = self.one_step(state.generator)
        self.grid("before", sampler)
        if self.parts.judge is not None and self.recipe.evaluate.final:
            self.metrics["before"] = self.judge(sampler, self.recipe.evaluate.final)
        io_safe.write_json(self.run_dir / METRICS, self.metrics)

    def finish(self, state: TrainState) -> RunResult:
        """Final checkpoint, figures, pipeline, report."""
        if self.saved_step != self.total_step(state):
            self.save(state)
        generator = state.averaged_generator()
        samplers = {"after": self.one_step(generator), "teacher": self.multi_step()}
        for name, sampler in samplers.items():
            self.grid(name, sampler)
            if self.parts.judge is not None and self.recipe.evaluate.final:
                self.metrics[name] = self.judge(sampler, self.recipe.evaluate.final)
                self.stop.check("training is done and saved; the same command finishes the figures")
        self.metrics["judge"] = self.judge_figures()
        self.metrics["outside_mask"] = self.outside_mask(state, generator)
        self.metrics["cost"] = {
            "training_s": state.training_s,
            "images": state.images,
            "flops": state.flops,
            "peak_memory_bytes": hardware.peak_memory_bytes(),
        }
        export_pipeline(
            generator, self.recipe, self.parts.conditions, self.run_dir / PIPELINE,
            base_sha256=self.parts.base_sha256, metrics=self.metrics,
        )  # fmt: skip
        self.metrics["cost"]["total_s"] = time.perf_counter() - self.started
        io_safe.write_json(self.run_dir / METRICS, self.metrics)
        self.tracker.event("end", self.total_step(state), training_s=state.training_s, images=state.images)
        if self.parts.judge is None:
            self.tracker.say("not judged: the model folder has no judge/ (give evaluate.judge); metrics.json holds the cost alone")
        return RunResult(self.run_dir, self.metrics, write_report(self.run_dir))

    def judge_figures(self) -> dict[str, Any] | None:
        """How far the judge itself can be trusted."""
        judge, reference, teacher = self.parts.judge, self.parts.reference, self.metrics["teacher"]
        if judge is None:
            return None
        real = reference.select(self.parts.conditions.retain) if reference is not None else None
        right = [v for v in (teacher or {}).get("per_class", {}).values()]
        return {
            "held_out_accuracy": judge.info.get("held_out_accuracy"),
            "teacher_accuracy": sum(right) / len(right) if right else None,
            "fid_floor": fid_floor(real.features, real.labels, seed=0) if real is not None else None,
            "reference_samples": len(real) if real is not None else None,
        }

    def outside_mask(self, state: TrainState, generator: Denoiser) -> dict[str, Any] | None:
        """Proof that weights outside the mask are the start's: their sha256 before and after (`salient_only`, one mask)."""
        mask = state.mask
        if mask is None or self.recipe.update_rule != "salient_only" or self.recipe.mask.refresh or self.recipe.distill_steps:
            return None
        start = load_parts(self.recipe).generator

        def outside(network: Denoiser) -> str:
            return io_safe.sha256_tensors((name, p.detach().cpu()[~mask.bool(name).cpu()]) for name, p in network.named_parameters())

        before, after = outside(start), outside(generator)
        if before != after:
            raise CheckpointError(f"weights outside the mask have changed ({before[:12]} is now {after[:12]}); please report this")
        self.tracker.say(f"{mask.total - mask.count} weights outside the mask are bit-identical to the start's (sha256 {after[:16]}…)")
        return {"weights": mask.total - mask.count, "before_sha256": before, "after_sha256": after}


def _without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != key}


def _forget_images(recipe: Recipe, parts: Parts) -> Callable | None:
    """`mask.data=PATH`: the user's own images of the forget class, dealt in order; no other data set is ever opened."""
    if not recipe.uses_mask or recipe.mask.source != "saliency" or recipe.mask.data in ("pseudo", "teacher"):
        return None
    from pecker_fast.data import forget_images

    return forget_images(recipe.mask.data, parts.teacher.sample_shape, parts.conditions.forget)


def _write_base(model: Any, folder: Path) -> Path:
    """An in-memory pipeline (or anything with `.unet` and `.scheduler`) as a model folder."""
    model.unet.save_pretrained(folder / "unet", safe_serialization=True)
    model.scheduler.save_pretrained(folder / "scheduler")
    return folder
