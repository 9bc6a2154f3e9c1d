"""Notices that a rank is dead or stalled, says which, and ends every process of the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from pecker_fast.terminal import Tolerant, say

DEAD_S = 8.0  # without a sign of life, whatever stall_s
EXIT_CODE = 4
ANSWER = timedelta(seconds=5)
NONE = "-"


class Heartbeat(threading.Thread):
    """A thread that tells the others every second how far this rank is, and looks how far they are.

    Two ways to fail: no sign of life (killed, its machine gone, stopped) for `DEAD_S`, or alive but without progress for
    `stall_s` while `running`. Ranks that wait for the culprit stand still too: it is the one that has got least far. The
    first to notice writes the verdict down; all read it there, the writer prints it, and every process ends with exit code 4.
    A stopped process on this machine is killed, since it cannot end itself.
    """

    def __init__(self, rank: int, world: int, stall_s: float, address: tuple[str, int]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.world, self.stall_s = rank, world, stall_s
        self.running = False  # whether standing still means stalled
        self._progress, self._step = 0, -1
        self._beats = 0
        self._over = threading.Event()
        self._at = address
        self._store = self._connect()
        self._seen: dict[int, tuple[Any, float, float]] = {}  # rank -> (record, time of last sign, of last progress)
        self._tell()

    @property
    def period_s(self) -> float:
        return min(1.0, self.stall_s / 8)

    @staticmethod
    def serve() -> tuple[str, int]:
        """Host the store in this process (rank 0): what the others must know to reach it."""
        store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=ANSWER)
        store.set("fault", NONE)
        _SERVED.append(store)  # for as long as the process lives
        return os.environ.get("MASTER_ADDR", "127.0.0.1"), store.port

    def _connect(self) -> TCPStore:
        host, port = self._at
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=ANSWER)

    def beat(self, step: int | None = None) -> None:
        """The main thread got on."""
        self._progress += 1
        if step is not None:
            self._step = step

    def stop(self) -> None:
        self._over.set()
        self.join(2 * self.period_s + ANSWER.total_seconds())

    def run(self) -> None:
        answered = time.monotonic()
        while not self._over.wait(self.period_s):
            try:
                self._tell()
                self._look()
                answered = time.monotonic()
            except RuntimeError:  # rank 0, which holds the store, is gone, or the wire is slow
                if self._over.is_set():
                    return
                here = 0 in self._seen and self._seen[0][0][5] == socket.gethostname()
                if time.monotonic() - answered > DEAD_S or (here and not _lives(self._seen[0][0][4])):
                    self._end(self._lost_first(), told=False)

    def _tell(self) -> None:
        self._beats += 1
        record = [self._beats, self._progress, self._step, self.running, os.getpid(), socket.gethostname()]
        self._store.set(f"beat/{self.rank}", json.dumps(record))

    def _look(self) -> None:
        fault = self._store.get("fault").decode()
        if fault != NONE:
            self._end(fault, told=True)
        now = time.monotonic()
        known = [r for r in range(self.world) if r in self._seen or self._store.check([f"beat/{r}"])]
        for r, raw in zip(known, self._store.multi_get([f"beat/{r}" for r in known])):
            record = json.loads(raw)
            old, sign, progress = self._seen.get(r, (None, now, now))
            if old is None or record[0] != old[0]:
                sign = now
            if old is None or record[1] != old[1] or not record[3]:
                progress = now
            self._seen[r] = record, sign, progress
        gone = [r for r in known if self._is_gone(r, now)]
        stalled = [r for r in known if now - self._seen[r][2] > self.stall_s]
        if gone:
            self._accuse(gone, "gave no sign of life and is taken for dead")
        elif stalled:
            least = min(self._seen[r][0][1] for r in stalled)
            self._accuse(
                [r for r in stalled if self._seen[r][0][1] == least], f"has stood still for {self.stall_s:g} s"
            )

    def _is_gone(self, r: int, now: float) -> bool:
        record, sign, _ = self._seen[r]
        if now - sign > DEAD_S:
            return True
        return r != self.rank and record[5] == socket.gethostname() and not _lives(record[4])

    def _accuse(self, ranks: list[int], what: str) -> None:
        for r in ranks:
            record = self._seen[r][0]
            if r != self.rank and record[5] == socket.gethostname() and _lives(record[4]):
                os.kill(record[4], signal.SIGKILL)  # it may be stopped, and would never read the verdict
        who = ", ".join(f"rank {r} (process {self._seen[r][0][4]} on {self._seen[r][0][5]})" for r in ranks)
        step = max(record[2] for record, *_ in self._seen.values())
        at = f" in iteration {step}" if step >= 0 else ""
        self._verdict(f"{who} {what}{at}; all ranks end; the same command resumes from the last checkpoint")

    def _verdict(self, text: str) -> None:
        written = self._store.compare_set("fault", NONE, text).decode()
        self._end(written, told=written != text)

    def fail(self, error: BaseException) -> None:
        """The main thread has failed: by an error of its own, or because another rank left it alone.

        Whoever is to blame shows within `DEAD_S`; if nobody does, this rank is."""
        deadline = time.monotonic() + DEAD_S + 2 * self.period_s
        while _is_lonely(error) and time.monotonic() < deadline and self.is_alive():
            time.sleep(self.period_s / 4)  # the thread ends the process when it knows
        self._over.set()
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        try:
            written = self._store.compare_set(
                "fault", NONE, f"rank {self.rank} failed: {line}; the same command resumes from the last checkpoint"
            )
            if f"rank {self.rank} failed" not in written.decode():
                self._end(written.decode(), told=True)
            time.sleep(2 * self.period_s if self.rank == 0 else 0)  # rank 0 holds what the others read
        except RuntimeError:
            self._end(self._lost_first(), told=False)

    def _lost_first(self) -> str:
        pid = self._seen[0][0][4] if 0 in self._seen else "?"
        return f"rank 0 (process {pid}) is gone; all ranks end; the same command resumes from the last checkpoint"

    def _end(self, text: str, told: bool) -> None:
        Tolerant(sys.stdout).flush()
        if not told:
            say(f"error: {text}")
            if self.rank == 0:
                time.sleep(3 * self.period_s)  # the others read the verdict here
        os._exit(EXIT_CODE)


_SERVED: list[TCPStore] = []


def _is_lonely(error: BaseException) -> bool:
    """Whether an error is what a collective says when another rank has gone."""
    text = str(error).lower()
    return any(word in text for word in ("connection", "peer", "gloo", "nccl", "socket", "timed out"))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()  # where there is no /proc, nothing is known
