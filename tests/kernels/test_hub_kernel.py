"""The kernel for the Hugging Face hub: its folder, its own namespace, and what loads it."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pecker_kernels as pk
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub") / "kernel"
    command = [
        sys.executable,
        str(ROOT / "kernels" / "hub" / "make.py"),
        str(place),
        "--repo",
        "someone/pecker-kernels",
        "--built",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


def test_the_folder_is_what_the_builder_takes(folder):
    build = tomllib.loads((folder / "build.toml").read_text())
    assert build["general"] == {
        "name": "pecker-kernels", "version": 1, "edition": 5, "license": "Apache-2.0", "backends": ["cpu", "cuda"],
        "hub": {"repo-id": "someone/pecker-kernels"},
    }  # fmt: skip
    assert "torch-noarch" in build
    package = folder / "torch-ext" / build["general"]["name"].replace("-", "_")
    assert "__all__" in (package / "__init__.py").read_text()
    assert not (package / "_ops.py").exists()  # the builder writes it
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert '"pecker::' not in text, path
        assert "torch.ops.pecker" not in text, path
    assert {p.name for p in folder.iterdir()} == {
        "build.toml",
        "flake.nix",
        "CARD.md",
        "torch-ext",
        "tests",
        "benchmarks",
        "build",
    }
    card = (folder / "CARD.md").read_text()
    assert 'get_kernel("someone/pecker-kernels", version=1)' in card
    assert all(f"`{name}`" in card for name in pk.__all__)
    assert "{" not in card


def loaded(folder):
    """As the package `kernels` imports a variant: under its id, from a file, whatever else is there."""
    variant = folder / "build" / f"torch-{'cuda' if torch.version.cuda else 'cpu'}"
    identity = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[identity] = module
    spec.loader.exec_module(module)
    return module


def stepped(kernels):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(6, 4))
    scores = kernels.SaliencyScores(model.named_parameters())
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    scores.accumulate()
    mask = kernels.SaliencyMask.from_scores(scores, density=0.2)
    kernels.MaskedAdam(model.named_parameters(), mask=mask, lr=1e-2, impl="reference").step()
    return mask.count, [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1]))


def test_it_lives_beside_the_installed_package_and_does_the_same(folder):
    theirs = loaded(folder)
    assert theirs is not pk
    assert theirs.MaskedAdam is not pk.MaskedAdam
    assert set(theirs.__all__) == set(pk.__all__)
    assert same(stepped(theirs), stepped(pk))
    namespace = theirs._ops._OPS_NAME if hasattr(theirs, "_ops") else sys.modules[f"{theirs.__name__}._ops"]._OPS_NAME
    assert namespace == theirs.__name__
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")}
    assert names == {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("pecker::")}
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = theirs.group_norm_silu(x, torch.ones(4), torch.zeros(4), 2)
    y.sum().backward()
    assert x.grad is not None


def test_the_package_kernels_loads_it(folder):
    kernels = pytest.importorskip("kernels.load")  # the folder of this name here is no package
    module = kernels.get_local_kernel(folder)
    assert same(stepped(module), stepped(pk))


def test_its_own_test_passes_where_only_it_is_installed(folder):
    variant = next((folder / "build").iterdir())
    link = variant.parent / "pecker_kernels"
    link.symlink_to(variant)
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            str(folder / "tests"),
        ]
        done = subprocess.run(
            command, cwd=folder, env={"PYTHONPATH": str(variant.parent), "PATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    finally:
        link.unlink()


def test_what_is_refused(folder, tmp_path):
    for arguments, line in (
        ([str(folder)], f"error: {folder}: is not empty"),
        ([str(tmp_path / "new"), "--repo", "nobody"], "error: --repo nobody: give OWNER/NAME"),
    ):
        command = [sys.executable, str(ROOT / "kernels" / "hub" / "make.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.startswith(line)
