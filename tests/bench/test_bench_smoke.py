"""Every benchmark suite runs at tiny size and says what it promises; docs/performance.md shows what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import tables  # noqa: E402
from deepspeed_adam import built, installed  # noqa: E402

QUICK = ("threshold", "bits")
SUITES = (*QUICK, "adam", "saliency")
PATHS = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
OUTSIDE = {
    key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
}  # pytest-xdist: no benchmarks
ENVIRONMENT = {
    **OUTSIDE, "BENCH_SCALE": "tiny", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(filter(None, PATHS)),
}  # fmt: skip
KEYS = {
    "ours", "peers", "ratios", "flops", "bytes", "bytes_per_s", "copy_bytes_per_s", "share_of_copy_bandwidth",
    "share_of_update_bandwidth", "share_of_iteration_at_most", "weights", "operation",
}  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder with the file of each of the quick suites."""
    return run(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with the file of every suite, iterations included."""
    return run(tmp_path_factory.mktemp("bench"), (*SUITES, "iteration"))


def run(folder, suites):
    """One process runs the suites; its file is cut into one a suite."""
    files = [f"bench/test_bench_{suite}.py" for suite in suites]
    # A suite that only a GPU can run must at least load.
    command = ["pytest", "-p", "no:cacheprovider", *files]
    command += ["--benchmark-json", folder / "all.json"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT, env={**ENVIRONMENT, "TORCH_EXTENSIONS_DIR": str(folder / "compiled")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert not (folder / "compiled").exists(), "only `make bench` compiles"
    if "adam" in suites:
        assert ("left out: DeepSpeed's Adam" in done.stdout) == (installed() and not built("cpu"))
    everything = json.loads((folder / "all.json").read_text())
    for suite in suites:
        entries = [e for e in everything["benchmarks"] if e["fullname"].startswith(f"bench/test_bench_{suite}.py")]
        (folder / f"{suite}.json").write_text(json.dumps({**everything, "benchmarks": entries}))
    return folder


@pytest.mark.parametrize(
    "suite", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in SUITES if s not in QUICK)]
)
def test_suite_reports(request, suite):
    folder = request.getfixturevalue("quick" if suite in QUICK else "results")
    result = json.loads((folder / f"{suite}.json").read_text())
    assert result["scale"] == "tiny"
    assert result["command"].startswith("BENCH_SCALE=tiny pytest ")
    assert f"bench/test_bench_{suite}.py" in result["command"]
    assert str(ROOT) not in json.dumps(result)
    assert {"versions", "device", "threads"} <= set(result["machine_info"])
    assert len(result["benchmarks"]) >= {"adam": 40, "threshold": 5, "saliency": 15, "bits": 9}[suite]
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        assert set(info) >= KEYS
        assert set(info["ratios"]) == set(info["peers"])
        assert info["bytes"] > 0
        assert "data" not in entry["stats"]
        # The fixture's clock stands around ours.
        assert entry["stats"]["median"] * 1e3 >= info["ours"]["p50_ms"]


@pytest.mark.slow
def test_every_named_peer_is_timed(results):
    named = {
        "adam": {"torch fused", "mask-multiply + fused", "boolean index + fused", "fused + foreach"},
        "threshold": {"torch.kthvalue", "torch.topk", "torch.sort"},
        "saliency": {"foreach", "tensor by tensor", "torch.topk", "torch.kthvalue"},
        "bits": {"numpy.packbits", "mul_ by a mask of the same dtype", "masked_fill_"},
    }
    for suite, peers in named.items():
        entries = json.loads((results / f"{suite}.json").read_text())["benchmarks"]
        assert peers <= {peer for entry in entries for peer in entry["extra_info"]["peers"]}


@pytest.mark.slow
def test_iterations_are_timed_beside_their_baselines(results):
    names = [e["name"] for e in json.loads((results / "iteration.json").read_text())["benchmarks"]]
    rules = ("dense", "differentiated", "salient_only")
    engine = [f"test_engine[{rule}]" for rule in (*rules, "alternating")]
    masked = ("differentiated", "salient_only", "alternating")
    engine += [f"test_engine_variants[{kind}-{rule}]" for kind in ("rows 0.1", "bf16") for rule in masked]
    assert sorted(names) == sorted(
        [*engine, *(f"test_baseline[{b}-{r}]" for b in ("plain", "upstream") for r in rules)]
    )
    lines = tables.load(results)["iteration"].splitlines()
    assert len(lines) == 2 + 2 + len(names)
    assert any(line.startswith("| engine | `alternating` |") and line.endswith("| – | – |") for line in lines)
    assert any(line.startswith("| plain | `salient_only` |") and "| 1.00 × |" in line for line in lines)


@pytest.mark.slow
def test_the_floor_of_an_iteration_is_measured_and_shown(tmp_path):
    file = tmp_path / "floor_digits.json"
    command = [sys.executable, "bench/floor.py", "--quick"]
    keys = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, "check": False}
    refused = subprocess.run(command, **keys)
    assert refused.returncode == 2
    assert "times nothing worth keeping" in refused.stderr
    done = subprocess.run([*command, "--output", str(file)], **keys)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    iteration = found["iteration"]
    assert 0 < iteration["flops_in_convolutions"] <= iteration["flops"]  # passes and layers are counted right
    assert iteration["flops_in_convolutions"] > 0.9 * iteration["flops"]
    assert min(iteration[key] for key in ("products_ms", "memory_ms", "layers_ms")) > 0
    assert set(iteration["measured_ms"]) == {"engine", "plain loop"}
    assert sum(layer["layers"] for layer in found["convolutions"]) > 15
    table = tables.load(tmp_path)["floor"]
    assert "| every convolution alone, as often as it runs |" in table
    assert table.count("\n| ") == 1 + 5 + 1 + len(found["convolutions"])


def test_an_account_becomes_a_table(tmp_path, capsys):
    from pecker_fast import cli

    keys = ["batch_size=2", "mask.samples=4", "--iterations", "1", "--json", str(tmp_path / "account_digits.json")]
    assert cli.main(["bench", "digits_plain", *keys]) == 0
    capsys.readouterr()
    table = tables.load(tmp_path)["account"]
    assert "| part | GFLOP, dense | GFLOP, masked | ratio |" in table
    assert "| one iteration |" in table
    assert "element mask of density 0.03, batch 2, 436,145 weights." in table
    assert str(tmp_path) not in table


def test_tables_replace_what_stands_between_their_markers(quick):
    made = tables.load(quick)
    assert set(made) == {*QUICK}
    text = "before\n<!-- bench:bits -->\nold\n<!-- /bench:bits -->\nafter\n"
    written = tables.replaced(text, made)
    assert written == f"before\n<!-- bench:bits -->\n{made['bits']}\n<!-- /bench:bits -->\nafter\n"
    assert tables.replaced(written, made) == written
    assert "| `popcount-0.1` |" in written
    assert "numpy.packbits" in written


def test_the_notebook_shows_the_results():
    """`python bench/tables.py --write docs/performance.md` after each `make bench`."""
    notebook = (ROOT / "docs" / "performance.md").read_text()
    made = tables.load()
    if not made:
        pytest.skip("no results yet")
    for suite, lines in made.items():
        assert f"<!-- bench:{suite} -->\n{lines}\n<!-- /bench:{suite} -->" in notebook, (
            f"the table of {suite} is out of date"
        )
