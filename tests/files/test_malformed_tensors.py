"""A damaged safetensors file gives one typed error and takes no memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from malformed import FIXED, GOOD, generated

from pecker_fast import files
from pecker_fast.errors import CheckpointError, DataError, ModelError

RSS_LIMIT_BYTES = 512 << 20


def test_the_good_file_is_good(tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    tensors, metadata = files.read_tensors(path)
    assert set(tensors) == {"a", "b"}
    assert tensors["b"].tolist() == list(range(16, 24))
    assert metadata == {}
    assert len(FIXED) >= 40


@pytest.mark.parametrize("name", FIXED)
def test_fixed_damage(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(FIXED[name])
    with pytest.raises(DataError) as caught:
        files.read_tensors(path)
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("error", [CheckpointError, ModelError])
def test_the_caller_chooses_the_error(tmp_path, error):
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(error):
            files.read_tensors(path, error=error)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("pipe", "zero", "gone", "loop"):
        with pytest.raises(DataError, match=name):
            files.read_tensors(tmp_path / f"{name}.safetensors")
        for read in (files.read_text, files.read_json, files.sha256_file):
            with pytest.raises(DataError, match=name):
                read(tmp_path / f"{name}.safetensors")


PROBE = """
import sys
from pathlib import Path
from malformed import FIXED, generated, pack
from pecker_fast.errors import DataError
from pecker_fast.files import read_tensors
path = Path(sys.argv[1])
many = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_000))
refused = read = 0
for content in [*FIXED.values(), *generated(int(sys.argv[2])), pack(b"{" + many + b"}", b"")]:
    path.write_bytes(content)
    try:
        read_tensors(path)
        read += 1
    except DataError as error:
        assert "\\n" not in str(error)
        refused += 1
# VmHWM and not getrusage, whose peak a child inherits from a parent larger than itself
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(refused, read, int(peak.split()[1]) * 1024)
"""


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_by_the_hundred_in_little_memory(tmp_path, count):
    root = Path(__file__).parents[2]
    paths = [str(Path(__file__).parent), str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "x.safetensors"), str(count)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, read, peak_bytes = map(int, done.stdout.split())
    assert refused + read == len(FIXED) + count + 1
    assert refused > count  # the few that are read were changed into another well-formed file, such as a name
    assert peak_bytes < RSS_LIMIT_BYTES


def test_generated_damage_is_not_all_alike():
    assert len(set(generated(300))) > 250


def test_a_file_cut_while_its_tensors_are_in_use_does_no_harm(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"a": torch.arange(1 << 16)})
    tensors, _ = files.read_tensors(path)
    os.truncate(path, 16)
    assert int(tensors["a"].sum()) == (1 << 16) * ((1 << 16) - 1) // 2
