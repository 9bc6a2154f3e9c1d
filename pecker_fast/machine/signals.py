"""Signals become a flag that every loop polls, so that the work is saved before the process ends."""

import signal
import threading
from types import FrameType, TracebackType

from pecker_fast.errors import Interrupted
from pecker_fast.machine.ranks import ALONE, Ranks


class StopFlag:
    """Context manager: SIGINT and SIGTERM set `signum` and nothing else; a second signal ends the process at once.

    Outside the main thread (where Python allows no handlers) it stays a plain flag. A signal to one rank stops all.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise SystemExit(128 + signum)  # not Interrupted: nothing may be saved from the middle of a step
        self.signum = signum

    def check(self, where: str) -> None:
        """Raise Interrupted if a signal has come to any rank; `where` says what is on disk by now. Takes all ranks."""
        self.ranks.beat()
        if signum := self.ranks.largest(self.signum or 0):
            raise self.ranks.shared(Interrupted(signum, f"stopped by {signal.Signals(signum).name}; {where}"))

    def check_here(self, where: str) -> None:
        """As `check`, on this rank alone: for what rank 0 does while the others wait."""
        self.ranks.beat()
        if self.signum is not None:
            raise Interrupted(self.signum, f"stopped by {signal.Signals(self.signum).name}; {where}")
