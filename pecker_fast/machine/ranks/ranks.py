"""One process, which is also what every run of many looks like to the code that trains."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from pecker_fast.errors import PeckerError, RecipeError

T = TypeVar("T")
E = TypeVar("E", bound=PeckerError)


class Ranks:
    """A run of one process. What a run of many does differently is in `group.Group`."""

    rank = 0
    world = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(self, act: Callable[[], T]) -> T:
        """Do it on every rank; where one fails, all raise what the first of them raised."""
        return act()

    def first(self, act: Callable[[], T]) -> T | None:
        """Do it on rank 0 while the others wait; None there. What it raises, all raise."""
        return act()

    def told(self, act: Callable[[], T]) -> T:
        """Do it on rank 0; what comes of it, or what it raises, all ranks have."""
        return act()

    def shared(self, error: E) -> E:
        """An error that every rank raises and the first alone prints."""
        error.silent, error.agreed = not self.is_first, True
        return error

    def everyones(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        return [value]

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return value

    def beat(self, step: int | None = None) -> None:
        """There was progress."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a rank without progress is taken for stalled."""
        yield

    def patience(self, stall_s: float) -> None:
        """How long a rank may stand still."""


ALONE = Ranks()


def launched_world() -> int:
    """How many processes the launcher started; 1 without a launcher. Raises RecipeError for a world that makes no sense."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise RecipeError(f"WORLD_SIZE={given!r}: a launcher sets a number from 1; start with torchrun or deepspeed")
    return int(given)
