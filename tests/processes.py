"""Real processes that start at once: forked from one that has imported what a run imports, and has done nothing else.

A new interpreter takes seven seconds of processor time until it has imported torch, diffusers and DeepSpeed.
"""

import functools
import multiprocessing as mp
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parent


@functools.cache
def context() -> Any:
    """The multiprocessing context of such processes."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    # Python 3.11 does not tell the process that is forked from where modules lie, and it goes on in silence without them
    paths = filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return found


class Started:
    """A process with the names that `subprocess.Popen` has."""

    def __init__(self, process: Any) -> None:
        self._process = process
        process.start()
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("pecker-fast", timeout or 0.0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def pecker_fast(
    *arguments: str, log: Path, env: dict[str, str] | None = None, first: Callable[[], None] | None = None
) -> Started:
    """`pecker-fast ARGUMENTS` with both streams written to a file.

    env: added to this process's environment. first: called in the process before anything else, a function of a module's own.
    """
    environment = {**os.environ, **(env or {})}
    log.write_bytes(b"")  # nothing of another process
    return Started(context().Process(target=_main, args=(arguments, environment, str(log), first), daemon=True))


def _main(arguments: tuple[str, ...], environment: dict[str, str], log: str, first: Callable[[], None] | None) -> None:
    assert "preloaded" in sys.modules, "every process would import torch anew"
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from pecker_fast import cli

    if first is not None:
        first()
    sys.exit(cli.main(arguments))
