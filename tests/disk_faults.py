"""Steps on the disk that fail, and processes that die before one of them; see `pecker_fast.files.writing.fault_point`."""

import contextlib
import errno
import os
from dataclasses import dataclass

from pecker_fast.errors import OutputError
from pecker_fast.files import writing


@dataclass(frozen=True)
class Fault:
    """What befalls a process: before its step `at` on the disk it dies, or so many steps fail with an error."""

    at: int
    error: int | None = None  # an errno; None = the process is gone
    steps: int = 1 << 30

    def __call__(self):
        """From here on, in this process."""
        seen = [0]

        def point(name):
            seen[0] += 1
            if seen[0] <= self.at or seen[0] > self.at + self.steps:
                return
            if self.error is None:
                os._exit(9)
            raise OSError(self.error, os.strerror(self.error))

        writing.fault_point = point


def steps_of(action, monkeypatch):
    """Names of the steps on the disk that an action takes."""
    seen = []
    monkeypatch.setattr(writing, "fault_point", seen.append)
    action()
    monkeypatch.setattr(writing, "fault_point", lambda name: None)
    return seen


def failing(action, at, monkeypatch):
    """The action, whose step `at` and all after it fail as those on a broken disk do."""
    left = [at]

    def point(name):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(writing, "fault_point", point)
    try:
        with contextlib.suppress(OutputError):
            action()
    finally:
        monkeypatch.setattr(writing, "fault_point", lambda name: None)


def killed(action, at, monkeypatch):
    """The action in a process that is gone before step `at`, with nothing cleared away."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 9 << 8
        return
    left = [at]

    def point(name):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    writing.fault_point = point
    try:
        action()
    finally:
        os._exit(1)
