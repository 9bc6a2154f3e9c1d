"""Many processes joined by torch.distributed: agreement on errors and signals, a heartbeat, an end that all come to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pecker_fast.errors import Interrupted, PeckerError, RankError
from pecker_fast.machine.ranks.heartbeat import Heartbeat
from pecker_fast.machine.ranks.ranks import ALONE, Ranks, launched_world

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # collectives wait as long as the heartbeat lets them
Failure = tuple[str, int, int]  # message, exit code, signal or 0
ALONE_KEYS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


class Group(Ranks):
    """This process among others. `control` is a gloo group beside whatever the gradients travel over."""

    def __init__(self, stall_s: float) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.heart: Heartbeat | None = None
        if self.world > 1:
            self.heart = Heartbeat(self.rank, self.world, stall_s, self._from_first(Heartbeat.serve))
            self.heart.start()

    def _from_first(self, make: Callable[[], Any]) -> Any:
        box = [make() if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    # -- failing together -------------------------------------------------------------------------------------------

    def agree(self, act: Callable[[], T]) -> T:
        error, result = None, None
        try:
            result = act()
        except PeckerError as raised:
            error = raised
        with self._waiting():
            failures = self.everyones(_failure(error))
        if any(failures):
            raise self._of_all(failures, error)
        return result  # type: ignore[return-value]

    def _of_all(self, failures: list[Failure | None], own: PeckerError | None) -> PeckerError:
        """One error for all ranks, which the first alone prints."""
        at = next(i for i, failure in enumerate(failures) if failure)
        message, code, signum = failures[at]  # type: ignore[misc]
        if own is not None and len(set(failures)) == 1:
            error = own
        else:
            error = Interrupted(signum, message) if signum else RankError(f"rank {at}: {message}", code)
        return self.shared(error)

    def first(self, act: Callable[[], T]) -> T | None:
        result, error = self._on_first(act)
        self._raise_firsts(self._from_first(lambda: _failure(error)), error)
        return result

    def told(self, act: Callable[[], T]) -> T:
        result, error = self._on_first(act)
        failure, shared = self._from_first(lambda: (_failure(error), result))
        self._raise_firsts(failure, error)
        return shared

    def _on_first(self, act: Callable[[], T]) -> tuple[T | None, PeckerError | None]:
        """(result, error) of rank 0; the others come here when it is done."""
        if self.is_first:
            try:
                outcome: tuple[T | None, PeckerError | None] = act(), None
            except PeckerError as error:
                outcome = None, error
            dist.barrier(group=self.control)
            return outcome
        with self._waiting():
            dist.barrier(group=self.control)
        return None, None

    def _raise_firsts(self, failure: Failure | None, own: PeckerError | None) -> None:
        if failure is None:
            return
        message, code, signum = failure
        error = own or (Interrupted(signum, message) if signum else RankError(message, code))
        raise self.shared(error)

    def everyones(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def largest(self, value: int) -> int:
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found)

    # -- staying alive together -------------------------------------------------------------------------------------

    def beat(self, step: int | None = None) -> None:
        if self.heart is not None:
            self.heart.beat(step)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if self.heart is None:
            yield
            return
        before, self.heart.running = self.heart.running, True
        self.heart.beat()
        try:
            yield
        finally:
            self.heart.running = before

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Inside, this rank waits for others and is not taken for stalled."""
        if self.heart is None:
            yield
            return
        before, self.heart.running = self.heart.running, False
        try:
            yield
        finally:
            self.heart.beat()
            self.heart.running = before

    def patience(self, stall_s: float) -> None:
        if self.heart is not None:
            self.heart.stall_s = stall_s

    def leave(self) -> None:
        """The run is over on this rank; returns when it is over on all."""
        if self.heart is not None:
            self.heart.running = False
            dist.barrier(group=self.control)
            self.heart.stop()
        dist.destroy_process_group()
        _as_before()
        _LEFT.append(self.rank)

    def abandon(self, error: BaseException) -> None:
        """This rank has failed by itself, or lost the others: let all of them end, and say who it was. Does not return
        where somebody else has failed first."""
        if self.heart is None:
            self.leave()
            return
        if threading.current_thread() is threading.main_thread():
            # a launcher sends it to all who are left; they have to speak first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.heart.fail(error)


@contextlib.contextmanager
def joined(stall_s: float) -> Iterator[Group]:
    """The ranks for as long as a run takes. Whatever ends it on one ends it on all."""
    group = join(stall_s)
    try:
        yield group
    except PeckerError as error:
        group.leave() if error.agreed else group.abandon(error)
        raise
    except BaseException as error:
        group.abandon(error)
        raise
    group.leave()


@contextlib.contextmanager
def launched(stall_s: float = 600.0) -> Iterator[Ranks]:
    """The ranks a launcher has started; this process alone where there are no others."""
    if launched_world() == 1:
        yield ALONE
        return
    with joined(stall_s) as group:
        yield group


def join(stall_s: float, backend: str | None = None) -> Group:
    """Join the processes the launcher started; without a launcher, a world of this process alone.

    backend: None = nccl beside gloo on a GPU, gloo on the CPU. Raises RankError where the others cannot be reached.
    """
    if _LEFT:
        raise RankError("engine.zero: DeepSpeed can be set up once in a process; start another one for another run", 2)
    if "RANK" not in os.environ:
        own = ALONE_KEYS | {"MASTER_PORT": str(_free_port())}
        _BEFORE.update({name: os.environ.get(name) for name in own})
        os.environ |= own
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    chosen = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        dist.init_process_group(chosen, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        _as_before()
        raise RankError(
            f"the ranks of this run did not find each other ({_line(error)}); check the launcher", 2
        ) from error
    return Group(stall_s)


_LEFT: list[int] = []  # not empty once this process has left a group
_BEFORE: dict[str, str | None] = {}  # the environment as it was, where `join` stood in for a launcher


def _as_before() -> None:
    """Nothing that comes later in this process, or is started by it, takes itself for a rank."""
    while _BEFORE:
        name, value = _BEFORE.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _failure(error: PeckerError | None) -> Failure | None:
    if error is None:
        return None
    return str(error), error.exit_code, error.signum if isinstance(error, Interrupted) else 0


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
