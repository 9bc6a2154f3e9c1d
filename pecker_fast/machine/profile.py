"""Names for the parts of an iteration. Nobody listens in a normal step, and then a name costs less than a microsecond.

The engine says `with part("score_backward"):` around its work; whoever wants to time or count it installs a recorder for
the iterations it looks at. A recorder only watches: it returns nothing to the engine, so results cannot depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Recorder(Protocol):
    """What is told of parts; they nest, and `leave` names the innermost."""

    def enter(self, name: str) -> None: ...
    def leave(self, name: str) -> None: ...


_recorder: Recorder | None = None


class part(contextlib.ContextDecorator):  # in small letters: it reads as a keyword where it stands
    """Context manager and decorator: what happens inside belongs to the part `name`. Keeps nothing, so it may be shared."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _recorder is not None:
            _recorder.enter(self.name)

    def __exit__(self, *error: object) -> None:
        if _recorder is not None:
            _recorder.leave(self.name)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, `recorder` is told of every part; to be entered and left between iterations. One at a time."""
    global _recorder
    if _recorder is not None:
        raise RuntimeError("a recorder is listening already")
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None
