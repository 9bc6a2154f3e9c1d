"""What is said on stdout and stderr: a terminal that lacks a character, or a reader that went away, is no reason to fail."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

NARROWEST = 60  # columns; on a narrower terminal tables break at its edge, and stay whole


class Tolerant:
    """A text stream that never raises: what its encoding lacks is escaped, and once nobody reads, nothing is written.

    `failure` is the error that ended it (a full disk, say); a reader who has seen enough, as `head` does, is none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.failure: OSError | None = None
        self.over = stream is None

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # asked by those who look for a binary stream
            raise TypeError(f"text expected, got {type(text).__name__}")
        self._guarded(lambda stream: stream.write(self._plain(stream, text)))
        return len(text)

    def flush(self) -> None:
        self._guarded(lambda stream: stream.flush())

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream is not None and not self.over and self.stream.isatty()

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would go past the guard
            raise AttributeError(name)
        return getattr(self.stream, name)

    def _plain(self, stream: TextIO, text: str) -> str:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        except (UnicodeError, LookupError):
            return text.encode("ascii", "backslashreplace").decode("ascii")

    def _guarded(self, action: Any) -> None:
        if self.over or self.stream is None:
            return
        try:
            action(self.stream)
        except OSError as reason:
            self.over = True
            self.failure = None if isinstance(reason, BrokenPipeError) else reason
            _silence(self.stream)
        except ValueError:  # closed
            self.over = True


def _silence(stream: TextIO) -> None:
    """What is still buffered goes nowhere; else the interpreter would try once more at its end, and say so."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
    """Inside, stdout and stderr are `Tolerant`; at the end one line says if stdout was cut short by an error."""
    _occupy_closed()
    before = sys.stdout, sys.stderr
    out, err = (stream if isinstance(stream, Tolerant) else Tolerant(stream) for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        out.flush()
        err.flush()
        if out.failure is not None:
            warn(f"the output was cut short: {out.failure.strerror or out.failure}")
        sys.stdout, sys.stderr = before


def _occupy_closed() -> None:
    """A closed standard descriptor (`>&-`) would become that of the next file opened, and be printed into."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def say(text: str) -> None:
    """One line on stderr, wherever it goes."""
    err = Tolerant(sys.stderr)
    err.write(f"{text}\n")
    err.flush()


def note(lines: Iterable[str]) -> None:
    """Lines on stderr."""
    for line in lines:
        say(f"note: {line}")


def warn(message: str) -> None:
    """One line on stderr."""
    say(f"warning: {' '.join(message.split())}")


def rich_console(stderr: bool = False, force_terminal: bool | None = None) -> Console:
    """A rich console over stdout or stderr that never raises."""
    from rich.console import Console

    stream = cast(TextIO, Tolerant(sys.stderr if stderr else sys.stdout))
    console = Console(file=stream, force_terminal=force_terminal)
    if console.width < 1:  # a terminal, or COLUMNS, that says 0
        console.width = NARROWEST
    return console


def table_console() -> Console:
    """The same over stdout, wide enough for a table: nothing is cut to the 80 columns of an imagined screen."""
    console = rich_console()
    if not console.is_terminal:
        console.width = 140
    elif console.width < NARROWEST:
        console.width = NARROWEST
    return console


def takes_a_bar() -> bool:
    """Whether stderr is a terminal that can draw a line anew."""
    return Tolerant(sys.stderr).isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class LiveBar(contextlib.AbstractContextManager["LiveBar"]):
    """Shows a progress bar, where there is one, while it is entered."""

    bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
