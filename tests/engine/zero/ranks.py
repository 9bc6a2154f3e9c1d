"""Runs a function on several ranks, each a process of its own, joined by gloo, with a time limit."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from limits import HUNG_S
from processes import context


def run_ranks(world: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """body(rank, *arguments) on each rank; what they returned, in rank order. Raises AssertionError with the first traceback.

    body must be a function of a module, so that a fresh process can import it.
    """
    server = context()
    queue = server.Queue()
    port = free_port()
    processes = [
        server.Process(target=_one, args=(rank, world, port, queue, body, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, outcome, failed = queue.get(timeout=HUNG_S)
            assert not failed, f"rank {rank}: {outcome}"
            results[rank] = pickle.loads(outcome)
    finally:
        for process in processes:
            process.join(10 if len(results) == world else 0.1)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _one(rank: int, world: int, port: int, queue: Any, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    sys.stdout.flush()
    try:
        # as bytes: a tensor in a queue lives as long as the process that put it there
        queue.put((rank, pickle.dumps(body(rank, *arguments)), False))
    except BaseException:
        queue.put((rank, traceback.format_exc(), True))
