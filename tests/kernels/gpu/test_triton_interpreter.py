"""The Triton kernels on CPU tensors, in Triton's interpreter: proves indexing and formulas, neither races nor speed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pecker_kernels import dispatch

CASES = Path(__file__).parent / "triton_cases"


@pytest.mark.skipif(not dispatch.triton_available(), reason="triton is not installed")
@pytest.mark.parametrize("cases", ["some", pytest.param("every", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(cases):
    """some: of every test at most so many of its cases as triton_cases/conftest.py says, spread evenly."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_CASES": cases}
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 0
    assert "skipped" not in done.stdout
