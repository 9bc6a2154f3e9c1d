"""A write is whole or absent, whichever of its steps fails; nothing is left behind."""

import errno
import os

import pytest
import torch

from pecker_fast import files
from pecker_fast.errors import OutputError

WRITERS = {
    "text": lambda path, n: files.write_text(path, f"value {n}"),
    "json": lambda path, n: files.write_json(path, {"value": n}),
    "bytes": lambda path, n: files.write_bytes(path, bytes([n])),
    "tensors": lambda path, n: files.write_tensors(path, {"value": torch.tensor(n)}),
}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def steps(monkeypatch):
    """Names of the fault points passed; `steps.fail(k, error)` makes the k-th raise."""

    class Steps(list):
        error = None
        at = -1

        def fail(self, at, error):
            self.clear()
            self.at, self.error = at, error

    seen = Steps()

    def point(name):
        seen.append(name)
        if len(seen) - 1 == seen.at:
            raise seen.error

    monkeypatch.setattr("pecker_fast.files.writing.fault_point", point)
    return seen


@pytest.mark.parametrize("kind", WRITERS)
def test_every_step_of_a_write_may_fail(tmp_path, steps, kind):
    path = tmp_path / "file"
    WRITERS[kind](path, 1)
    assert list(steps) == ["write:file", "fsync:file", "replace:file", f"fsync:{tmp_path.name}"]
    old = path.read_bytes()
    WRITERS[kind](tmp_path / "other", 2)
    new = (tmp_path / "other").read_bytes()
    for at in range(4):
        for error in (
            OSError(errno.ENOSPC, "No space left on device"),
            PermissionError(13, "Permission denied"),
            Killed(),
        ):
            path.write_bytes(old)
            steps.fail(at, error)
            with pytest.raises(Killed if isinstance(error, Killed) else OutputError) as caught:
                WRITERS[kind](path, 2)
            assert path.read_bytes() == (new if at == 3 else old)
            assert sorted(os.listdir(tmp_path)) == ["file", "other"]
            if not isinstance(error, Killed):
                assert str(caught.value).startswith(f"{path}: cannot write: {error.strerror}; ")


def test_a_full_disk_says_what_to_do(tmp_path, steps):
    steps.fail(0, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OutputError, match="No space left on device; free some space and try again"):
        files.write_text(tmp_path / "file", "x")


@pytest.mark.parametrize("place", ["/proc/nowhere/file", "/dev/null/file"])
def test_an_impossible_place_is_an_output_error(place):
    with pytest.raises(OutputError, match="choose another output folder"):
        files.write_text(place, "x")


def test_a_folder_in_the_way_is_an_output_error(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        files.write_text(tmp_path / "file", "x")
    assert os.listdir(tmp_path) == ["file"]


def test_tensors_survive_in_every_form(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "slice": torch.arange(10, dtype=torch.int16)[2:9:3],
        "parameter": torch.nn.Parameter(torch.randn(3, dtype=torch.float64)),
        "half": torch.randn(5).half(),
        'odd names: é/"\\': torch.ones(1, dtype=torch.uint8),
    }
    tensors["shared"] = tensors["transposed"]
    path = tmp_path / "deep" / "er" / "a.safetensors"
    files.write_tensors(path, tensors, {"b": "2", "a": "1"})
    first = path.read_bytes()
    files.write_tensors(path, dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    assert path.read_bytes() == first
    stock = load_file(path)
    ours, metadata = files.read_tensors(path)
    assert metadata == {"a": "1", "b": "2"}
    assert set(ours) == set(stock) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(stock[name], tensor)
        assert ours[name].dtype == tensor.dtype


def test_the_hash_of_tensors_sees_name_type_shape_and_every_byte():
    base = files.sha256_tensors([("a", torch.zeros(4)), ("b", torch.ones(2))])
    assert base == files.sha256_tensors(iter([("a", torch.zeros(8)[::2]), ("b", torch.ones(2))]))
    others = [
        [("c", torch.zeros(4)), ("b", torch.ones(2))],
        [("a", torch.zeros(2, 2)), ("b", torch.ones(2))],
        [("a", torch.zeros(4, dtype=torch.int32)), ("b", torch.ones(2))],
        [("a", torch.tensor([0, 0, 0, -0.0])), ("b", torch.ones(2))],
        [("b", torch.ones(2)), ("a", torch.zeros(4))],
        [("a", torch.zeros(4))],
    ]
    hashes = {files.sha256_tensors(named) for named in others}
    assert len(hashes) == len(others)
    assert base not in hashes
