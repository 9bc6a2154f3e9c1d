"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU: it compiles, spills nothing and moves wide words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pecker_kernels import dispatch

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "bench" / "triton_kernels.py"
TABLE = ROOT / "bench" / "results" / "triton_kernels.json"

pytestmark = pytest.mark.skipif(not dispatch.triton_available(), reason="triton is not installed")


def compiled(*arguments):
    """Kernels are defined for the compiler, not for the interpreter, in a process of their own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_every_kernel_compiles_without_spills_and_with_wide_accesses(tmp_path, arch):
    done = compiled("--arch", str(arch), "--output", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    now = json.loads((tmp_path / "table.json").read_text())["kernels"]
    kept = json.loads(TABLE.read_text())["kernels"]
    names = [(row["kernel"], row["arch"]) for row in now]
    assert len(names) == len(set(names)) > 0
    assert names == [(row["kernel"], row["arch"]) for row in kept if row["arch"] == f"sm_{arch}"], (
        "run python bench/triton_kernels.py"
    )
    before = {row["kernel"]: row["instructions"] for row in kept if row["arch"] == f"sm_{arch}"}
    grown = [
        (row["kernel"], before[row["kernel"]], row["instructions"])
        for row in now
        if row["instructions"] > 1.1 * before[row["kernel"]]
    ]
    assert not grown, "more instructions than the table has; if they are worth it, run python bench/triton_kernels.py"


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("name", "complaint"),
    [("spills", "spills"), ("narrow", "bits wide"), ("hopeful", "not be aligned"), ("wrong", "does not compile")],
)
def test_the_gate_sees_a_broken_kernel(tmp_path, name, complaint):
    done = compiled("--arch", "90", "--module", f"triton_broken:{name}", "--output", str(tmp_path / "table.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout
