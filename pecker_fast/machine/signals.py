"""Signals become a flag that every loop polls, so that the work is saved before the process ends."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType

from torch import Tensor

from pecker_fast.errors import SIGNALS, Interrupted, Stopped
from pecker_fast.machine.ranks import ALONE, Ranks


class StopFlag:
    """Context manager: SIGINT, SIGTERM and SIGHUP set `signum` and nothing else; a second signal raises `Stopped` where it
    arrives, a third ends the process as if nobody listened.

    What was ignored when it began (SIGHUP under `nohup`) stays ignored. Outside the main thread, where Python allows no
    handlers, it is a plain flag. A signal to one rank stops all.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.signum: int | None = None
        self._where: str | None = None  # inside `at_once`
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            for handled in self._previous:
                signal.signal(handled, signal.SIG_DFL)
            raise Stopped(signum)  # not Interrupted: nothing may be saved from the middle of a step
        self.signum = signum
        if self._where is not None:
            raise self._interrupted(signum, self._where)

    @staticmethod
    def _interrupted(signum: int, where: str) -> Interrupted:
        return Interrupted(signum, f"stopped by {signal.Signals(signum).name}; {where}")

    def check(self, where: str) -> None:
        """Raise Interrupted if a signal has come to any rank; `where` says what is on disk by now. Takes all ranks."""
        self.ranks.beat()
        if signum := self.ranks.largest(self.signum or 0):
            raise self.ranks.shared(self._interrupted(signum, where))

    @contextlib.contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Inside, a signal raises Interrupted where it arrives, between two operations of a network too: for what may be
        left off anywhere, as a draw, on this rank alone, as what rank 0 does while the others wait."""
        self.ranks.beat()
        before, self._where = self._where, where
        try:
            if self.signum is not None:
                raise self._interrupted(self.signum, where)
            yield
        finally:
            self._where = before


@contextlib.contextmanager
def answering(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, a backward pass over these parameters comes back to Python at each of them, where signals are answered."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: None) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
