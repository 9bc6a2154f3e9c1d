"""Signals to the command line where no loop has taken them over: the work ends where it stands, with one line."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from pecker_fast.errors import SIGNALS, Stopped


@contextlib.contextmanager
def stoppable(for_good: bool) -> Iterator[None]:
    """Inside, the first of SIGINT, SIGTERM and SIGHUP raises `Stopped`; a second ends the process without a word.

    for_good: the process ends after the block, and signals end it at once until then. Ignored signals stay ignored (`nohup`). A
    rank of many is left to its launcher: collectives do not come back to Python.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)}

    def stop(signum: int, frame: FrameType | None) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_DFL)
        raise Stopped(signum)

    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if for_good else handler)
