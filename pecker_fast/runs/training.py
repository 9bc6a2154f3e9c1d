"""One run as it moves through its stages: distillation, mask, forgetting, figures, export."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pecker_kernels import SaliencyMask

from pecker_fast import files
from pecker_fast.account.memory import Prediction
from pecker_fast.engine import LocalEngine, TrainState
from pecker_fast.engine.zero import ZeroEngine
from pecker_fast.errors import CheckpointError, Interrupted, OutputError
from pecker_fast.evaluate import Sampler
from pecker_fast.export import Result, export_folder
from pecker_fast.forgetting import ForgetImages, OwnImages
from pecker_fast.loading import Parts, is_sound, pick_device, start_generator
from pecker_fast.machine import StopFlag, answering, hardware
from pecker_fast.machine.ranks import ALONE, Ranks
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe, idle_keys
from pecker_fast.records import (
    MASK,
    PIPELINE,
    Tracker,
    load_checkpoint,
    other_machine,
    read_checkpoint_stage,
    save_checkpoint,
    sound_metrics,
    write_metrics,
)
from pecker_fast.report import write_report
from pecker_fast.runs import begin
from pecker_fast.runs.costs import memory_of, parts_of
from pecker_fast.runs.judging import outside_mask
from pecker_fast.runs.loop import Losses, run_stage
from pecker_fast.runs.prompt_judging import judging_of
from pecker_fast.runs.result import RunResult
from pecker_fast.terminal import note, warn


def engine_of(recipe: Recipe, parts: Parts, device: torch.device, ranks: Ranks) -> LocalEngine:
    """Where this recipe's tensors live."""
    if recipe.engine.zero:
        return ZeroEngine(recipe, parts.conditions, device, ranks)
    return LocalEngine(recipe, parts.conditions, device)


class Training:
    """One run: the state as it moves through the stages, and the callbacks that watch it."""

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        identity: dict[str, str],
        tracker: Tracker,
        stop: StopFlag,
        forget_images: ForgetImages | None,
        started: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.recipe, self.parts, self.identity, self.tracker, self.stop = recipe, parts, identity, tracker, stop
        self.forget_images, self.started = forget_images, started
        self.device = pick_device()
        self.engine = engine_of(recipe, parts, self.device, ranks)
        self.judging = judging_of(recipe, parts, lambda: stop.at_once("the same command takes the figures up again"))
        self.run_dir = Path(recipe.output)
        self.saved: tuple[str, int] | None = None  # stage and step of the newest checkpoint
        self.mask_cost: dict[str, float] = {}  # of one mask
        self.prediction: Prediction | None = None  # of the memory this run will take
        self.written = recipe  # in the user's own words, for the model card
        self.own_images: OwnImages | None = None  # that a method learns from
        self.metrics: dict[str, Any] = {"before": None, "after": None, "teacher": None}

    # -- stages -------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Path | None) -> RunResult:
        total = self.recipe.distill_steps + self.recipe.steps
        for key in idle_keys(self.recipe):
            self.tracker.say(f"note: {key}")
        for line in self.parts.notes:
            self.tracker.say(f"note: {line}")
        if checkpoint is None:
            state = self.start()
        else:
            state = self.resume(checkpoint)
            self.take_over(checkpoint, state)
            if self.total_step(state) > total:
                raise CheckpointError(
                    f"{self.run_dir}: has done {self.total_step(state)} steps, the recipe wants {total}; "
                    "raise steps, or resume=never to start over"
                )
            if self.is_finished(total):
                self.tracker.say(f"{self.run_dir}: this run is finished; resume=never runs it again")
                return RunResult(self.run_dir, self.metrics, self.ranks.first(lambda: write_report(self.run_dir)))
            if state.stage == "forget":
                begin.again(self, state, checkpoint.resolve().parents[1])
            self.metrics |= {"after": None, "step": None}
            self.ranks.first(lambda: note(other_machine(checkpoint)))
        self.log_start(checkpoint, state)
        if checkpoint is None:
            self.ranks.first(self.try_judge)
        if state.stage == "distill":
            self.iterate(state, self.recipe.distill_steps)
            self.save(state)  # what follows is long, and lets go of this state
            state = self.enter_forget(state)
        elif checkpoint is None:
            state = self.enter_forget(state)
        self.iterate(state, self.recipe.steps)
        return self.finish(state)

    def is_finished(self, total: int) -> bool:
        """Whether metrics.json holds the figures of this very length and evaluation, and pipeline/ what was exported with them."""
        same = (self.metrics.get("step"), self.metrics.get("evaluate")) == (total, self.recipe.evaluate.model_dump())
        return same and self.ranks.told(lambda: is_sound(self.run_dir / PIPELINE))

    def take_over(self, checkpoint: Path, state: TrainState) -> None:
        """What else a resumed run needs from the folder of its checkpoint: figures and grid of `before`, the mask."""
        source = checkpoint.resolve().parents[1]
        self.metrics |= self.ranks.told(lambda: sound_metrics(source, self.identity["recipe_sha256"]))
        if source != self.run_dir.resolve():
            self.metrics |= {"after": None, "teacher": None, "step": None}
            self.ranks.first(lambda: self.copy_before(source))
        else:
            self.saved = (state.stage, self.total_step(state))
        self.save_mask(state)

    def copy_before(self, source: Path) -> None:
        grid = Path("samples") / "before.png"
        if (source / grid).is_file():
            files.write_bytes(self.run_dir / grid, (source / grid).read_bytes())
        self.write_metrics()

    def write_metrics(self) -> None:
        write_metrics(self.run_dir, self.metrics, self.identity["recipe_sha256"])

    def distilled(self, checkpoint: Path | None) -> TrainState:
        """The plain distillation stage alone."""
        state = self.resume(checkpoint) if checkpoint else self.start()
        self.log_start(checkpoint, state)
        self.iterate(state, self.recipe.distill_steps)
        self.save(state)
        return state

    def start(self) -> TrainState:
        """φ, ψ, θ on the device, in the first stage the recipe has."""
        parts = self.parts
        stage = "distill" if self.recipe.distill_steps else "forget"
        state = self.engine.start(parts.teacher, parts.score, parts.generator, stage)
        if not self.recipe.engine.shard_teacher:
            parts.teacher = state.teacher
        parts.score, parts.generator = state.score, state.generator
        return state

    def resume(self, checkpoint: Path) -> TrainState:
        """The state of a checkpoint."""
        state = self.start()
        state.stage, mask = read_checkpoint_stage(checkpoint)
        if state.stage == "forget":
            self.engine.follow(state, mask)
        load_checkpoint(state, checkpoint, self.identity)
        return state

    def enter_forget(self, state: TrainState) -> TrainState:
        """From the distilled (or given) θ to the forget stage: average becomes θ, ψ stays, mask, fresh optimizers."""
        fresh = self.engine.forget_stage(state)
        self.judge_start(fresh)
        begin.pool(self, fresh)
        self.engine.follow(fresh, self.timed_mask(fresh) if self.recipe.uses_mask else None)
        self.log_mask(fresh)
        begin.anchor(self, fresh)
        begin.attacks(self, fresh)
        begin.edit(self, fresh)
        return fresh

    def iterate(self, state: TrainState, steps: int) -> None:
        self.tracker.progress(state.stage, steps, self.total_step(state) - state.step)
        callbacks = (self.log_step, self.checkpoint, self.evaluate_in_loop)
        run_stage(self.recipe, self.engine, state, steps, self.refresh, callbacks, self.stop, self.save)

    # -- mask ---------------------------------------------------------------------------------------------------

    def timed_mask(self, state: TrainState) -> SaliencyMask | None:
        """A mask at the present weights; its time and FLOPs count as training."""
        start = time.perf_counter()
        where = "stopped in the saliency pass; the same command goes on"

        def poll() -> None:
            self.stop.check(where)

        with self.ranks.running(), self.leaving(state, where):
            mask = self.engine.make_mask(state, self.forget_images, poll)
        seconds = time.perf_counter() - start
        flops = 0.0
        if not self.engine.sharded:
            with self.engine.autocast(), self.leaving(state, where):
                flops = self.engine.saliency_pass(state, self.forget_images, poll).flops()
        state.training_s += seconds
        state.flops += flops
        self.mask_cost = {"ms": 1e3 * seconds, "flops": flops}
        return mask

    @contextmanager
    def leaving(self, state: TrainState, where: str) -> Iterator[None]:
        """A pass that may be left off anywhere, backward too. Ranks leave it together, between batches."""
        if self.ranks.world > 1 or self.engine.sharded:
            yield
            return
        with self.stop.at_once(where), answering(p for _, p in state.generator.named_parameters()):
            yield

    def refresh(self, state: TrainState) -> None:
        mask = self.timed_mask(state)
        assert mask is not None  # the loop refreshes a mask that is there
        self.engine.set_mask(state, mask)
        self.log_mask(state)

    def log_mask(self, state: TrainState) -> None:
        mask = state.mask
        if mask is None:
            return
        self.save_mask(state)
        self.tracker.event(
            "mask", self.total_step(state), source=self.recipe.mask.source, density=mask.density, count=mask.count,
            total=mask.total, threshold=mask.threshold,
        )  # fmt: skip

    def save_mask(self, state: TrainState) -> None:
        mask = state.mask

        def write() -> None:
            if mask is not None:
                with files.whole_file(self.run_dir / MASK) as target:
                    mask.save(target)

        self.ranks.first(write)

    # -- callbacks ----------------------------------------------------------------------------------------------

    def total_step(self, state: TrainState) -> int:
        return state.step + (self.recipe.distill_steps if state.stage == "forget" else 0)

    def log_start(self, checkpoint: Path | None, state: TrainState) -> None:
        resumed = self.total_step(state) if checkpoint else None
        self.tracker.event(
            "start", self.total_step(state), **hardware.environment(), **self.identity, resumed_from=resumed
        )

    def log_step(self, state: TrainState, losses: Losses) -> None:
        if state.step % 10 and state.step > 1:
            self.tracker.tick(self.total_step(state))
            return
        self.engine.settle(state)
        values = self.engine.means(losses)
        rate = state.images / max(state.training_s, 1e-9)
        self.tracker.event(
            "step", self.total_step(state), stage=state.stage, **values, images=state.images, images_per_s=rate
        )

    def evaluate_in_loop(self, state: TrainState, losses: Losses) -> None:
        every = self.recipe.evaluate.every
        if state.stage == "forget" and every and state.step % every == 0 and self.judging.possible:
            self.engine.settle(state)
            generator = self.engine.averaged(state)

            def judge() -> None:
                assert generator is not None
                result = self.judging.figures(self.judging.of(generator), self.recipe.evaluate.samples)
                del result["per_class"], result["intervals"]["per_class"], result["seed"]
                self.tracker.event("evaluate", self.total_step(state), **result)

            self.ranks.first(judge)

    def checkpoint(self, state: TrainState, losses: Losses) -> None:
        every = self.recipe.checkpoint.every
        if every and state.step % every == 0:
            self.save(state)

    def save(self, state: TrainState) -> None:
        step = self.total_step(state)
        if self.saved == (state.stage, step):
            return
        self.engine.settle(state)
        folder = save_checkpoint(state, self.run_dir, step, self.identity, self.recipe.checkpoint.keep, self.ranks)
        self.saved = (state.stage, step)
        self.tracker.event("checkpoint", step, path=str(folder.relative_to(self.run_dir)))

    # -- the end ------------------------------------------------------------------------------------------------

    def try_judge(self) -> None:
        """Before anything is trained: does the judge see in the teacher's own samples what they were drawn for?"""
        tried = None if self.recipe.engine.shard_teacher else self.judging.tried()
        if tried is not None:
            self.tracker.event("judge", 0, **tried)
            if tried["doubts"] is not None:
                self.tracker.say(f"warning: {tried['doubts']}")

    def judge_start(self, state: TrainState) -> None:
        """`before`: θ as forgetting finds it. Kept in metrics.json at once, since a resumed run cannot make it again."""
        # a fresh average is θ itself: one process needs no copy
        generator = self.engine.averaged(state) if self.engine.sharded else state.generator

        def judge() -> None:
            assert generator is not None
            sampler = self.judging.of(generator)
            self.judging.grid(sampler, self.run_dir / "samples" / "before.png")
            if self.judging.possible and self.recipe.evaluate.final:
                self.metrics["before"] = self.judging.figures(sampler, self.recipe.evaluate.final)
            self.write_metrics()

        self.ranks.first(judge)

    def finish(self, state: TrainState) -> RunResult:
        """Final checkpoint, figures, pipeline, report."""
        self.save(state)
        generator = self.engine.averaged(state)

        def concluded() -> RunResult:
            with self.stop.at_once("the last checkpoint is written; the same command makes figures and export"):
                return self.conclude(state, generator)

        return self.ranks.first(concluded) or RunResult(self.run_dir, None, None)

    def conclude(self, state: TrainState, generator: Denoiser | None) -> RunResult:
        """Figures, pipeline and report of the averaged generator, on rank 0."""
        assert generator is not None
        self.parts.teacher = self.parts.teacher.to(self.device)
        self.metrics["forget_steps"] = state.step if state.stage == "forget" else 0
        self.metrics["before"] = self.before_again()
        self.judge_as("after", self.judging.of(generator))
        self.judge_teacher()
        self.metrics["judge"] = self.judging.trust(self.metrics["teacher"])
        self.metrics["outside_mask"] = proof = outside_mask(self.recipe, self.parts.teacher, state.mask, generator)
        if proof is not None:
            self.tracker.say(
                f"{proof['weights']} weights outside the mask are bit-identical to the start's "
                f"(sha256 {proof['after_sha256'][:16]}…)"
            )
        self.metrics["cost"] = {
            "training_s": state.training_s,
            "images": state.images,
            "flops": None if self.engine.sharded else state.flops,
            "peak_memory_bytes": hardware.peak_memory_bytes(),
            "parts": parts_of(self.recipe, state, self.mask_cost, self.metrics),
            "memory": memory_of(self.prediction, state, self.tracker.say),
        }
        result = Result(generator, self.written, self.parts, self.parts.base_sha256, self.metrics)
        export_folder(result, self.run_dir, self.run_dir / PIPELINE)
        self.metrics |= {"step": self.total_step(state), "evaluate": self.recipe.evaluate.model_dump()}
        self.metrics["cost"]["total_s"] = time.perf_counter() - self.started
        self.write_metrics()
        self.tracker.event("end", self.total_step(state), training_s=state.training_s, images=state.images)
        if not self.judging.possible:
            self.tracker.say(
                "not judged: the model folder has no judge/ (give evaluate.judge); metrics.json holds the cost alone"
            )
        return RunResult(self.run_dir, self.metrics, write_report(self.run_dir))

    def judge_as(self, name: str, sampler: Sampler) -> None:
        """Grid and figures of one row."""
        self.judging.grid(sampler, self.run_dir / "samples" / f"{name}.png")
        if self.judging.possible and self.recipe.evaluate.final:
            self.metrics[name] = self.judging.figures(sampler, self.recipe.evaluate.final)

    def judge_teacher(self) -> None:
        """The reference row. Where it cannot be made it stays empty, since the run itself is done and is to be exported. What has
        many steps started as the teacher, so `before` is that row."""
        if not self.recipe.one_step:
            self.metrics["teacher"], before = self.metrics["before"], self.run_dir / "samples" / "before.png"
            if before.is_file():
                files.write_bytes(before.with_name("teacher.png"), before.read_bytes())
            return
        try:
            self.judge_as("teacher", self.judging.multi_step())
        except (Interrupted, OutputError):
            raise
        except Exception as error:
            self.metrics["teacher"] = None
            line = " ".join(str(error).split())[:300] or type(error).__name__
            warn(f"the teacher's reference row is left empty: {line}")

    def before_again(self) -> dict[str, Any] | None:
        """Figures of `before`, of as many samples as those of `after`: drawn again where a resumed run is judged by other
        numbers than the run it goes on from, None where θ started as what was distilled and is not kept."""
        before, samples = self.metrics["before"], self.recipe.evaluate.final
        if not self.judging.possible or not samples or (before and before["samples"] == samples):
            return before
        if self.recipe.distill_steps:
            return None
        start = start_generator(self.recipe, self.parts.teacher).to(self.device).freeze()
        return self.judging.figures(self.judging.of(start), samples)
