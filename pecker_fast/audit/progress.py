"""How an audit speaks to the console."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pecker_fast.terminal import LiveBar, rich_console, say, takes_a_bar


class AuditTicker(LiveBar):
    """A progress bar on a terminal, a plain line for each unit elsewhere (on standard error); nothing where `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.begun = time.monotonic()
        if takes_a_bar() and not quiet:
            columns = (TextColumn("audit"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=rich_console(stderr=True))
            self.task = self.bar.add_task("")

    def told(self, probe: str, subject: str, done: int, total: int) -> None:
        """A unit begins, `done` of `total` are over."""
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, description=f"{probe}: {subject}")
        elif not self.quiet:
            say(f"audit {done + 1}/{total}: {probe}, {subject}  {time.monotonic() - self.begun:.0f} s")
