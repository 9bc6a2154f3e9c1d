"""Errors a user can cause: one line saying what was wrong, where, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
from collections.abc import Iterator


class PeckerError(Exception):
    """Base of every error this package raises on purpose.

    The message is one printable line: foreign text in it can neither break a log into records nor steer a terminal.
    `exit_code` is what the command line returns.
    """

    exit_code = 2
    silent = False  # another rank prints it
    agreed = False  # every rank of the run raises it

    def __init__(self, message: str) -> None:
        line = " ".join(str(message).split())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class RecipeError(PeckerError):
    """A recipe, or an override of one of its keys, is wrong; the message names the dotted key."""


class ModelError(PeckerError):
    """A model folder is missing, damaged, of an unsupported kind or not safe to open."""


class DataError(PeckerError):
    """An input file that is neither a recipe nor a model cannot be read."""


class OutputError(PeckerError):
    """A result cannot be written: no space, no permission, or a folder that belongs to another run."""


class CheckpointError(PeckerError):
    """A checkpoint is missing, damaged or of another run."""


class NonFiniteError(PeckerError):
    """A loss or gradient became NaN or infinite; nothing was written to the weights."""

    exit_code = 3


class Interrupted(PeckerError):
    """A signal stopped the work after it was saved; exits with 128 + `signum`, as a shell expects."""

    def __init__(self, signum: int = signal.SIGINT, message: str | None = None) -> None:
        self.signum = int(signum)
        super().__init__(message or f"stopped by {signal.Signals(self.signum).name}")
        self.exit_code = 128 + self.signum


class RankError(PeckerError):
    """What another rank of the run met, or that the ranks do not fit together."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a verb


class Stopped(BaseException):
    """A signal ended the work where it stood; no Exception, so that nobody takes it for a damaged file."""

    def __init__(self, signum: int) -> None:
        self.signum = int(signum)
        super().__init__(f"stopped by {signal.Signals(self.signum).name}")


class OutOfMemory(PeckerError):
    """More memory was asked for than the machine, or its GPU, has."""


_LACKS = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|not enough memory|cannot allocate memory|out of memory|_ALLOC_FAILED",
    re.I,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.I)


def lack_of_memory(error: BaseException) -> str | None:
    """What was asked for, in a few words, where an error of Python, torch or the system says that memory is short; else None."""
    short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not short and not (isinstance(error, RuntimeError | OSError) and _LACKS.search(str(error))):
        return None
    asked = _ASKED.search(str(error))
    place = " of the GPU" if "CUDA" in str(error) else ""
    return f"out of memory{place}" + (f" ({asked[1]} more were asked for)" if asked else "")


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn a lack of memory inside the block into `OutOfMemory`, which says what to do about it."""
    try:
        yield
    except PeckerError:
        raise
    except Exception as error:
        if (what := lack_of_memory(error)) is None:
            raise
        raise OutOfMemory(f"{what}; {remedy}") from None
