"""How pretraining speaks to the console."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pecker_fast.terminal import LiveBar, rich_console, say, takes_a_bar

LINE_EVERY_S = 5.0
SHOWN = 20  # classes of a line


def say_classes(names: Sequence[str]) -> None:
    """Which class number is which folder, in one line on standard error; all of them are in model.json."""
    shown = ", ".join(f"{number} = {name}" for number, name in enumerate(names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more (class_names in model.json)" if len(names) > SHOWN else ""
    say(f"classes: {shown}{more}")


class Ticker(LiveBar):
    """A progress bar on a terminal, one plain line every few seconds elsewhere (on standard error)."""

    def __init__(self, what: str, total: int, start: int = 0) -> None:
        self.what, self.total, self.start = what, total, start
        self.begun = self.last = time.monotonic()
        if takes_a_bar():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=rich_console(stderr=True))
            self.task = self.bar.add_task(what, total=total, completed=start, note="")

    def due(self, step: int) -> bool:
        """Whether it is time for a `note`: asked first, because reading a loss may wait for the device."""
        return step == self.total or time.monotonic() - self.last >= (0.5 if self.bar else LINE_EVERY_S)

    def note(self, step: int, text: str) -> None:
        """Show that `step` steps are done."""
        self.last = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=step, note=text)
            return
        rate = (step - self.start) / max(self.last - self.begun, 1e-9)
        left_s = (self.total - step) / max(rate, 1e-9)
        done = f"{self.what}: step {step}/{self.total}"
        say(f"{done}  {text}  {rate:.1f} steps/s  {left_s:.0f} s left")
