"""What a run tells while it goes: run.jsonl, the console and, when asked, TensorBoard.

run.jsonl is the record; the other two are mirrors of it. Values must be plain Python numbers: nothing here reads from a
device, so logging never waits for one.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pecker_fast import terminal
from pecker_fast.errors import DataError, PeckerError
from pecker_fast.files import LineFile, disk_step
from pecker_fast.terminal import warn

EVENTS = "run.jsonl"
_PLAIN_STEPS, _PLAIN_S = 50, 10.0  # off a terminal: a line every so many steps, or after so many seconds
_RESERVED = {"event", "step", "time_s"}
_SHOWN = {
    "evaluate": ("ua", "cover_rate", "retain_accuracy", "fid", "inception_score", "precision", "recall"),
    "mask": ("source", "density", "count", "total"),
    "checkpoint": ("path",),
    "stop": ("reason",),
    "end": ("training_s", "images"),
}
_LOSSES = ("score_loss", "retain_loss", "forget_loss")
_FRACTIONS = {"ua", "cover_rate", "retain_accuracy", "precision", "recall"}


class Tracker:
    """Appends events to `run_dir`/run.jsonl and shows them.

    Args:
        run_dir: the run folder; created if missing. An existing run.jsonl is continued: a last line torn by a kill is
            cut off first.
        tensorboard: mirror every number to `run_dir`/tensorboard.
        console: "auto" (a progress bar on a terminal, plain lines elsewhere), "rich", "plain", "none", or a rich
            Console. All output goes to stderr, unless a Console is given.

    Raises:
        PeckerError: `tensorboard` without the package, or an unknown `console`.
        OutputError: the folder or file cannot be written.
    """

    def __init__(self, run_dir: str | Path, tensorboard: bool = False, console: str | Console = "auto") -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / EVENTS
        self._started = time.monotonic()
        self._board = _Board(self.run_dir / "tensorboard") if tensorboard else None
        self._console, self._live = _console(console)
        self._file: LineFile | None = LineFile(self.path)
        self._told = False  # that the record has a gap
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage, self._total, self._first = "", 0, 0
        self._rate_from: tuple[float, int] | None = None
        self._ua: float | None = None
        self._printed_s = -math.inf

    def event(self, name: str, step: int, **values: Any) -> None:
        """Append one line with `event`, `time_s` (seconds since this tracker was opened), `step` and `values`.

        NaN and infinities become null. A value that JSON does not know, a tensor above all, raises TypeError.
        """
        if _RESERVED & values.keys():
            raise ValueError(f"event {name}: {', '.join(sorted(_RESERVED & values.keys()))} cannot be a value's name")
        if self._file is None:
            raise ValueError(f"event {name}: the tracker is closed")
        record = {"event": name, "time_s": round(time.monotonic() - self._started, 3), "step": step, **values}
        self._append(self._file, json.dumps(_finite(record), ensure_ascii=False, allow_nan=False))
        if self._board is not None:
            self._board.add(name, step, values)
        with self._showing():
            self._show(name, step, values)

    def _append(self, file: LineFile, line: str) -> None:
        """A whole line or none: where the disk is full the run goes on, and is told once that its record has a gap."""
        try:
            file.append(line)
        except OSError as reason:
            if not self._told:
                warn(f"{self.path}: cannot write: {reason.strerror or reason}; the run goes on, its record has a gap")
            self._told = True

    @contextlib.contextmanager
    def _showing(self) -> Iterator[None]:
        """Inside, a display that fails (a console of the caller's whose reader went away, say) is shown nothing any more."""
        try:
            yield
        except (Exception, SystemExit):
            self._console = self._progress = None

    def progress(self, stage: str, total: int, start: int = 0) -> None:
        """Begin a stage of `total` steps, the first of which follows global step `start`. Ends the stage before."""
        self._stop_bar()
        self._stage, self._total, self._first = stage, total, start
        self._rate_from, self._printed_s = None, -math.inf
        with self._showing():
            self._start_bar(stage, total)

    def _start_bar(self, stage: str, total: int) -> None:
        if self._live and self._console is not None:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(stage, total=total, text="")
            self._progress.start()

    def tick(self, step: int) -> None:
        """Move the bar to global step `step` without logging anything; no effect off a terminal."""
        self._note_rate(step)
        with self._showing():
            if self._progress is not None:
                self._progress.update(self._task, completed=step - self._first)

    def say(self, text: str) -> None:
        """One line for the reader, above the bar; not part of the record."""
        with self._showing():
            if self._console is not None:
                self._console.print(escape(text), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the bar and close the files; may be called twice."""
        self._stop_bar()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # a disk that tells only now that it was full
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, name: str, step: int, values: dict[str, Any]) -> None:
        if name == "evaluate" and isinstance(values.get("ua"), float):
            self._ua = values["ua"]
        if self._console is None:
            return
        if name == "step":
            self._show_step(step, values)
        elif name == "start" and values.get("resumed_from") is not None:
            self.say(f"resumed from step {values['resumed_from']}")
        elif name in _SHOWN:
            shown = [f"{key} {_text(key, values[key])}" for key in _SHOWN[name] if values.get(key) is not None]
            self.say(f"{name} at step {step}: {', '.join(shown)}")

    def _show_step(self, step: int, values: dict[str, Any]) -> None:
        self._note_rate(step)
        parts = [f"{values['images_per_s']:,.0f} images/s"] if values.get("images_per_s") is not None else []
        parts += [f"ETA {eta}" for eta in [self._eta(step)] if eta]
        losses = [f"{key[:-5]} {_text(key, values[key])}" for key in _LOSSES if values.get(key) is not None]
        parts += ["loss " + " ".join(losses)] if losses else []
        attack = values.get("adversary_error")
        parts += [] if attack is None else [f"attack {_text('adversary_error', attack)}"]
        parts += [] if self._ua is None else [f"UA {_text('ua', self._ua)}"]
        text, done = " · ".join(parts), step - self._first
        if self._progress is not None:
            self._progress.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if done % _PLAIN_STEPS == 0 or done == self._total or now - self._printed_s >= _PLAIN_S:
            self._printed_s = now
            stage = self._stage or values.get("stage", "")
            self.say(f"{stage} {done}/{self._total or '?'} · {text}".strip())

    def _note_rate(self, step: int) -> None:
        if self._rate_from is None:
            self._rate_from = (time.monotonic(), step)

    def _eta(self, step: int) -> str:
        """Time left in this stage, from the steps this process has done itself (a resumed run starts in the middle)."""
        if self._rate_from is None or step <= self._rate_from[1] or not self._total:
            return ""
        per_step_s = (time.monotonic() - self._rate_from[0]) / (step - self._rate_from[1])
        left = int(max(0, self._first + self._total - step) * per_step_s)
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if left >= 3600 else f"{left // 60}:{left % 60:02}"

    def _stop_bar(self) -> None:
        progress, self._progress = self._progress, None
        with self._showing():
            if progress is not None:
                progress.stop()


class NoTracker(Tracker):
    """What a rank that is not the first tracks: nothing."""

    def __init__(self) -> None:
        pass

    def event(self, name: str, step: int, **values: Any) -> None:
        pass

    def progress(self, stage: str, total: int, start: int = 0) -> None:
        pass

    def tick(self, step: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def require_tensorboard() -> Any:
    """torch's SummaryWriter class; raises PeckerError, naming the extra, where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise PeckerError(
            "TensorBoard was asked for and is not installed; pip install 'pecker-fast[track]', or leave it out"
        ) from None
    return SummaryWriter


class _Board:
    """TensorBoard, opened at the first number so that a resumed run can hide what it will write again.

    A mirror, no record: where it cannot be written the run goes on without it, and says so once.
    """

    def __init__(self, folder: Path) -> None:
        self._make, self._folder = require_tensorboard(), folder
        self._writer: Any = None
        self._over = False

    def add(self, name: str, step: int, values: dict[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._over or (not numbers and name != "start"):
            return
        with self._mirroring():
            if self._writer is None:
                resumed = values.get("resumed_from") if name == "start" else None
                self._writer = self._make(str(self._folder), purge_step=None if resumed is None else resumed + 1)
            if name == "start":
                return
            for key, value in numbers.items():
                self._writer.add_scalar(f"{name}/{key}", value, step)
            if name != "step":
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None and not self._over:
            with self._mirroring():
                self._writer.close()

    @contextlib.contextmanager
    def _mirroring(self) -> Iterator[None]:
        try:
            disk_step(f"write:{self._folder.name}")
            yield
        except Exception as reason:  # its writer is a thread, which hands on whatever it met
            self._over = True
            line = getattr(reason, "strerror", None) or reason
            warn(f"{self._folder}: cannot write: {line}; the run goes on without TensorBoard")


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """All events of a run.jsonl in the order written; a torn last line is left out.

    Raises:
        DataError: the file cannot be read, or a line before the last is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as reason:
        raise DataError(f"{path}: cannot be read: {reason.strerror or reason}") from None
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and "event" in record:
            events.append(record)
        elif number < len(lines):  # what follows the last line break was never finished
            raise DataError(f"{path}: line {number} is damaged; remove it to read the rest")
    return events


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if key in _FRACTIONS and math.isfinite(value) else f"{value:.4g}"


def _console(console: str | Console) -> tuple[Console | None, bool]:
    """The console (None: silent) and whether it takes a live bar."""
    if isinstance(console, Console):
        return console, console.is_terminal
    if console == "none":
        return None, False
    if console not in ("auto", "rich", "plain"):
        raise PeckerError(f"console must be auto, rich, plain or none, got {console!r}")
    live = console == "rich" or (console == "auto" and terminal.takes_a_bar())
    return terminal.rich_console(stderr=True, force_terminal=True if console == "rich" else None), live
