"""Whole runs over ranks, started as a launcher starts them."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from limits import HUNG_S
from processes import Started, pecker_fast
from ranks import free_port

COMMON = [
    "generator=null", "forget=0", "cover=1", "batch_size=8", "mask.samples=16", "mask.density=0.3", "mask.contrast=false",
    "evaluate.every=0",
    "evaluate.samples=8", "evaluate.final=8", "evaluate.teacher_steps=2", "ema=0.9",
]  # fmt: skip


@dataclass
class Job:
    """The processes of one run and what they print."""

    processes: list[Started]
    folder: Path

    def outputs(self) -> list[str]:
        logs = [self.folder / f"rank{rank}.log" for rank in range(len(self.processes))]
        return [log.read_text() if log.exists() else "" for log in logs]

    def wait(self, limit_s: float = HUNG_S) -> list[int]:
        """Exit codes; kills and fails where a process outlives the limit."""
        deadline = time.monotonic() + limit_s
        try:
            for process in self.processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            alive = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
            raise AssertionError(
                f"ranks {alive} still alive after {limit_s} s:\n" + "\n".join(self.outputs())
            ) from None
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes]

    def wait_for(self, done, limit_s: float = HUNG_S) -> None:
        """Until done() holds."""
        deadline = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise AssertionError("the run did not get there:\n" + "\n".join(self.outputs()))
            time.sleep(0.02)


def start(folder: Path, world: int, *arguments: str, of_rank: dict[int, list[str]] | None = None) -> Job:
    """`pecker-fast train ...` on each of `world` ranks; of_rank: more arguments of one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    port, processes = free_port(), []
    for rank in range(world):
        env = {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
        }  # fmt: skip
        words = ["train", *arguments, *(of_rank or {}).get(rank, [])]
        processes.append(pecker_fast(*words, log=folder / f"rank{rank}.log", env=env))
    return Job(processes, folder)


def run(folder: Path, world: int, *arguments: str) -> Job:
    """A run that has to come to its end."""
    job = start(folder, world, *arguments)
    codes = job.wait()
    assert codes == [0] * world, "\n".join(job.outputs())
    assert not (folder / "compiled").exists(), "a run compiles nothing"
    return job
