"""The command line: what it calls, what it prints, and the one line and exit code of every mistake."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pecker_fast import cli
from pecker_fast.cli import verb
from pecker_fast.errors import CheckpointError, Interrupted, OutputError
from pecker_fast.recipe import load_recipe
from pecker_fast.runs.result import RunResult

ROOT = Path(__file__).parents[2]
COMMANDS = ["train", "pretrain", "sample", "evaluate", "report", "mask", "export", "doctor", "bench", "recipes"]


def error_of(capsys, *arguments, code=2):
    """The one line on stderr of a command that fails with `code`."""
    assert cli.main(arguments) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text[7:-1]


def run_line(line):
    return cli.main(line.split())


def stand_in(monkeypatch, module, **functions):
    """Replace a module by one that holds these functions alone."""
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))


def recorder(result=None, error=None):
    def function(*arguments, **keys):
        function.calls.append((arguments, keys))
        if error is not None:
            raise error
        return result

    function.calls = []
    return function


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["recipes", "copy"], ["recipes", "keys"]])
def test_every_command_has_help_with_examples(command, flag):
    result = CliRunner().invoke(cli.app, [*command, flag])
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert "Examples:" in result.output
    assert "pecker-fast " + " ".join(command) in result.output


def test_no_command_prints_help_and_version_prints_one_line(capsys):
    assert cli.main([]) == 0
    assert "Usage: " in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "pecker-fast 0.1.0\n"
    assert cli.main(["recipes"]) == 0
    assert "Usage: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "digits"], "No such command 'trian'. Did you mean 'train'"),
        (["train"], "Missing argument 'RECIPE'."),
        (["train", "digits", "--tensorbord"], "No such option: --tensorbord"),
        (["train", "digitz"], "recipe digitz: no such recipe or file, did you mean digits?"),
        (["train", "digits", "mask.densty=1"], "override mask.densty: unknown key, did you mean mask.density?"),
        (["train", "digits", "steps"], "override 'steps': expected key=value"),
        (["train", "digits", "forget=1", "cover=1"], "override cover: class 1 is to be forgotten itself"),
        (["bench", "digits", "mask.densty=1"], "override mask.densty: unknown key, did you mean mask.density?"),
        (["bench", "mask.densty=1"], "override mask.densty: unknown key, did you mean mask.density?"),
        (["bench", "digitz"], "recipe digitz: no such recipe or file, did you mean digits?"),
        (["bench", "--iterations", "0"], "Invalid value for '--iterations'"),
        (["bench", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: not a file in a folder that"),
        (["bench", "mask.data=photos"], "mask.data: bench opens no images, got 'photos'; use pseudo or teacher"),
        (["doctor", "nope"], "recipe nope: no such recipe or file"),
        (["pretrain", "digits", "--channels", "a,b"], "--channels: expected numbers such as 64,128,128, got 'a,b'"),
        (["pretrain", "digits", "--batch-size", "0"], "batch_size: 0 is out of range"),
        (["evaluate", "runs/x", "--json", "no/such/f.json"], "--json no/such/f.json: not a file in a folder that"),
        (["pretrain", "digit"], "pretrain digit: no such data set, did you mean digits?"),
        (["sample", "runs/x", "--classes", "a"], "--classes: expected numbers such as 0,1,2, got 'a'"),
        (["sample", "runs/x", "--count", "0"], "Invalid value for '--count'"),
        (["export", "runs/x", "--weights", "best"], "--weights: expected ema or raw, got 'best'"),
        (["mask", "runs/nothing"], "runs/nothing/mask.safetensors: not there; no such run folder"),
        (["recipes", "shw"], "No such command 'shw'. Did you mean 'show'"),
        (["recipes", "show", "nope"], "recipe nope: no such recipe or file"),
        (["recipes", "copy", "nope"], "recipe nope: no such recipe or file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line_and_exit_code_2(capsys, arguments, message):
    assert error_of(capsys, *arguments).startswith(message)


def test_train_resolves_the_recipe_and_prints_what_came_of_it(capsys, monkeypatch, tmp_path):
    from rich.table import Table

    table = Table("", "before", "after")
    table.add_row("UA", "1 %", "99 %")
    audit = {"verdict": "as if never known by all 2 probes"}
    result = RunResult(tmp_path, {"after": {}}, tmp_path / "report.html", audit=audit)
    train = recorder(result)
    stand_in(monkeypatch, "pecker_fast.runs", train=train)
    stand_in(monkeypatch, "pecker_fast.report", metrics_table=recorder(table), audit_table=recorder("comes back"))
    assert cli.main(["train", "digits", "steps=3", "--tensorboard", "lr=1e-5"]) == 0
    (recipe,), keys = train.calls[0]
    assert recipe == load_recipe("digits", ["steps=3", "lr=1e-5"])
    assert keys.pop("ranks").world == 1
    assert keys == {"tensorboard": True, "quiet": False, "dry_run": False}
    out = capsys.readouterr().out
    assert "99 %" in out
    assert "comes back" in out
    assert "as if never known by all 2 probes" in out
    assert f"run folder: {tmp_path}\nreport: {tmp_path}/report.html\n" in out

    assert cli.main(["train", "digits", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_dry_run_prints_the_resolved_recipe(capsys, monkeypatch, tmp_path):
    found = (("memory (predicted)", "3 MiB: teacher 1 MiB"), ("model", "a: # b"))
    result = types.SimpleNamespace(run_dir=tmp_path, metrics=None, report=None, found=found)
    train = recorder(result)
    stand_in(monkeypatch, "pecker_fast.runs", train=train)
    assert cli.main(["train", "digits", "seed=7", "--dry-run", "--device", "cuda:80GB"]) == 0
    assert train.calls[0][1]["device"] == "cuda:80GB"
    path = tmp_path / "r.yaml"
    path.write_text(capsys.readouterr().out)
    assert path.read_text().startswith("# memory (predicted): 3 MiB: teacher 1 MiB\n# model: a: # b\n")
    assert load_recipe(path) == load_recipe("digits", ["seed=7"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OutputError("runs/x: no space\nleft"), 2, "runs/x: no space left"),
        (CheckpointError("damaged \x1b[31m"), 2, "damaged \\x1b[31m"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT"),
        (MemoryError(), 2, "out of memory; use a smaller batch_size or fewer samples"),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "internal error: ZeroDivisionError: by zero; run with PECKER_DEBUG=1 for the traceback",
        ),
    ],
)
def test_every_failure_is_one_line_with_its_exit_code(capsys, monkeypatch, error, code, message):
    monkeypatch.delenv("PECKER_DEBUG", raising=False)
    stand_in(monkeypatch, "pecker_fast.runs", train=recorder(error=error))
    assert error_of(capsys, "train", "digits", code=code) == message


def test_control_c_before_the_run_takes_over_is_130(monkeypatch):
    stand_in(monkeypatch, "pecker_fast.runs", train=recorder(error=KeyboardInterrupt()))
    assert cli.main(["train", "digits"]) == 130


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("PECKER_DEBUG", "1")
    stand_in(monkeypatch, "pecker_fast.runs", train=recorder(error=ZeroDivisionError()))
    assert cli.main(["train", "digits"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_errors_of_the_kernels_are_the_users(capsys, monkeypatch):
    from pecker_kernels.errors import MaskError

    stand_in(monkeypatch, "pecker_fast.runs", train=recorder(error=MaskError("the mask is of another model")))
    assert error_of(capsys, "train", "digits") == "the mask is of another model"


def test_the_verbs_hand_their_options_on(capsys, monkeypatch):
    sample, evaluate, export = recorder("a.png"), recorder({"after": {}}), recorder("p")
    pretrain, report = recorder("m"), recorder("r.html")
    stand_in(monkeypatch, "pecker_fast.runs", sample_run=sample, evaluate_run=evaluate, export_run=export)
    stand_in(monkeypatch, "pecker_fast.pretrain", pretrain=pretrain)
    stand_in(
        monkeypatch,
        "pecker_fast.report",
        write_report=report,
        run_tables=recorder([]),
        metrics_table=recorder("the table"),
    )
    run = Path("runs/x")
    assert (
        cli.main(
            ["sample", "runs/x", "--classes", "0,2", "--count", "3", "--seed", "5", "--output", "o.png", "--before"]
        )
        == 0
    )
    assert run_line("evaluate runs/x --samples 10 --seed 2 --judge j") == 0
    assert run_line("export runs/x --weights raw -o out") == 0
    assert cli.main(["report", "runs/x"]) == 0
    assert (
        cli.main(
            ["pretrain", "images", "--data", "d", "--steps", "9", "--seed", "1", "--size", "32", "--distill-steps", "0"]
        )
        == 0
    )
    keys = {"classes": [0, 2], "count": 3, "seed": 5, "output": Path("o.png"), "before": True, "prompts": None}
    assert sample.calls == [((run,), keys)]
    assert evaluate.calls == [((run,), {"samples": 10, "seed": 2, "judge": Path("j"), "everything": False})]
    assert export.calls == [((run,), {"output": Path("out"), "weights": "raw", "form": "diffusers"})]
    assert report.calls == [((run,), {})]
    keys = {"data": Path("d"), "output": None, "steps": 9, "seed": 1, "distill_steps": 0, "size": 32}
    keys |= {"batch_size": None, "channels": None, "without": (), "parts_of": None}
    assert pretrain.calls == [(("images",), keys)]
    assert capsys.readouterr().out == "images: a.png\nthe table\npipeline: p\nreport: r.html\nmodel folder: m\n"


def test_mask_shows_one_row_a_tensor(capsys, monkeypatch, tmp_path):
    import pecker_kernels
    import torch

    named = [("a.weight", torch.nn.Parameter(torch.zeros(4, 8))), ("b", torch.nn.Parameter(torch.zeros(10)))]
    pecker_kernels.SaliencyMask.random(named, density=0.5, seed=0).save(str(tmp_path / "mask.safetensors"))
    assert cli.main(["mask", str(tmp_path), "--plot", str(tmp_path / "mask.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tensor\tshape\tweights\tkept\tdensity"
    assert lines[1].startswith("a.weight\t(4, 8)\t32\t")
    assert sum(int(line.split("\t")[3]) for line in lines[1:3]) == 21
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_recipes_list_show_and_copy(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "list"]) == 0
    assert "digits\tThe demo" in capsys.readouterr().out
    assert cli.main(["recipes", "show", "digits"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# The demo")
    assert cli.main(["recipes", "show", "digits", "--all"]) == 0
    assert "resume: auto" in capsys.readouterr().out
    assert cli.main(["recipes", "keys"]) == 0
    assert "mask.density\tnumber\t0.5\t" in capsys.readouterr().out
    assert cli.main(["recipes", "copy", "digits"]) == 0
    assert Path("digits.yaml").read_text() == shown
    capsys.readouterr()
    assert error_of(capsys, "recipes", "copy", "digits") == "digits.yaml: exists already; give another file name"
    assert cli.main(["recipes", "copy", "digits", "deep/mine.yaml"]) == 0
    assert load_recipe(Path("deep/mine.yaml")) == load_recipe("digits")


def test_doctor_tells_what_is_missing_and_how_to_mend_it(capsys, monkeypatch, tmp_path):
    from pecker_fast.machine import hardware

    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tmp_path}/none\noutput: {tmp_path}/run\n")
    assert cli.main(["doctor", str(recipe)]) == 1
    rows = {line.split("\t")[0]: line.split("\t") for line in capsys.readouterr().out.splitlines()}
    assert rows["python"][1] == rows["torch"][1] == rows["disk"][1] == "ok"
    assert rows["model"][1] == "missing"
    monkeypatch.setattr(hardware, "version_of", lambda name: None if name in ("tensorboard", "diffusers") else "1")
    rows = {check.name: check for check in hardware.doctor()}
    assert rows["tensorboard"].state == "note"
    assert "pecker-fast[track]" in rows["tensorboard"].remedy
    assert rows["diffusers"].state == "missing"


def test_the_environment_is_plain_values():
    import json

    from pecker_fast.machine import hardware

    found = json.loads(json.dumps(hardware.environment()))
    assert set(found) == {"versions", "device", "threads"}
    assert {"pecker-fast", "python", "torch", "diffusers"} <= set(found["versions"])
    assert hardware.peak_memory_bytes() > 50 << 20


def test_cells_of_a_table():
    assert [verb._cell(value) for value in (None, 0.123456, 7, "x", (4, 8))] == ["–", "0.1235", "7", "x", "(4, 8)"]


def work_of_children_s():
    """Processor time, which a busy machine lengthens little."""
    times = os.times()
    return times.children_user + times.children_system


def process(*arguments):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pecker_fast", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_real_processes_exit_as_promised():
    start = work_of_children_s()
    done = process("--help")
    assert work_of_children_s() - start < 5  # well under a second on an idle core
    assert done.returncode == 0
    assert "train" in done.stdout
    done = process("train", "digits", "steps=-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: override steps: expected a number of at least 0, got -1\n"
    done = process("recipes", "show", "digits", "--all")
    assert done.returncode == 0
    assert "model: digits" in done.stdout


def test_typer_app_is_the_one_that_is_installed():
    assert isinstance(cli.app, typer.Typer)
    assert 'pecker-fast = "pecker_fast.cli:main"' in (ROOT / "pyproject.toml").read_text()
