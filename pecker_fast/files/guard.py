"""One door for what libraries raise over a foreign file: whatever it is becomes one line that names the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pecker_fast.errors import ModelError, OutOfMemory, PeckerError, lack_of_memory
from pecker_fast.files.reading import first_line

_LONGEST = 150
_PANIC = "PanicException"  # of libraries in Rust; it is no Exception


@contextlib.contextmanager
def guarded(where: Path | str, what: str) -> Iterator[None]:
    """Inside, an error of any library becomes `ModelError` "where: what (kind: its first line)"; errors of our own and
    interruptions pass. A lack of memory becomes `OutOfMemory`."""
    try:
        yield
    except PeckerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        if (lack := lack_of_memory(error)) is not None:  # nothing may be wrong with the file
            raise OutOfMemory(f"{where}: {lack} while it was read; free some, or take a machine with more") from error
        raise ModelError(f"{where}: {what} ({type(error).__name__}: {first_line(error)[:_LONGEST]})") from error
