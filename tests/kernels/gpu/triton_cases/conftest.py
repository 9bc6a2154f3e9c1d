"""Cases that run the Triton kernels: natively where there is a GPU, else in Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter needs a process of its own:
test_triton_interpreter.py starts one. Without a GPU and outside that process nothing is collected here.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from pecker_kernels import dispatch

# kernel_gates.py and some.py, whichever folder pytest was started on
sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 3)]

from some import by_test, spread  # noqa: E402

if not (dispatch.triton_available() and (dispatch.interpreted() or torch.cuda.is_available())):
    collect_ignore_glob = ["test_*.py"]
elif dispatch.interpreted():
    collect_ignore = ["test_gpu_large.py"]


SOME = 1  # cases of a test that are run where some are enough


def pytest_collection_modifyitems(config, items):
    """TRITON_CASES=some: the first, the last and those evenly between, of every parametrised test."""
    if os.environ.get("TRITON_CASES") != "some":
        return
    kept = {item.nodeid for cases in by_test(items).values() for item in spread(cases, SOME)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


@pytest.fixture(scope="session")
def device():
    return "cpu" if dispatch.interpreted() else "cuda"


@pytest.fixture
def poison(monkeypatch):
    """torch.empty full of ones (NaN for floats): a lane that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(-1 if tensor.dtype.is_signed else 255)

    monkeypatch.setattr(torch, "empty", poisoned)
