"""Every command that README and docs/using.md show: its verbs and options exist, and what can be tried here is tried."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from tiny_models import write_tiny_model

from pecker_fast import cli
from pecker_fast.recipe import load_recipe, recipe_from
from pecker_fast.runs import train

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/using.md")
RUNS_ON = {"digits"}  # run folders of these names stand in the scratch folder


def commands(page: str) -> list[list[str]]:
    """Lines of the page's bash blocks, without comments, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


OURS = sorted({shlex.join(words[1:]) for page in PAGES for words in commands(page) if words[0] == "pecker-fast"})
LAUNCHED = sorted({shlex.join(words) for page in PAGES for words in commands(page) if "pecker_fast" in words})


def test_the_pages_show_nothing_else():
    known = {"pecker-fast", "make", "source", "torchrun"}
    assert {words[0] for page in PAGES for words in commands(page)} <= known
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for words in commands(page):
            assert words[0] != "make" or re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
    assert len(OURS) > 20


@pytest.mark.parametrize("line", OURS)
def test_verbs_and_options_exist(line):
    command, words = typer.main.get_command(cli.app), shlex.split(line)
    while hasattr(command, "commands"):
        assert words[0] in command.commands
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words, resilient_parsing=False)


@pytest.mark.parametrize("line", LAUNCHED)
def test_launched_recipes_exist(line):
    words = shlex.split(line)
    name, *overrides = words[words.index("train") + 1 :]
    assert load_recipe(name, overrides).engine.zero


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder in which a user has followed the page so far, with a finished run called digits; in new/ an own recipe."""
    folder = tmp_path_factory.mktemp("user")
    model = write_tiny_model(folder / "model")
    keys = {"steps": 2, "batch_size": 4, "mask": {"samples": 8, "density": 0.3}, "checkpoint": {"every": 2}}
    keys |= {"evaluate": {"every": 0, "samples": 8, "final": 12, "teacher_steps": 2}}
    train(recipe_from({**keys, "model": str(model), "output": str(folder / "runs" / "digits")}), quiet=True)
    (folder / "new").mkdir()
    shutil.copy(ROOT / "pecker_fast" / "recipe" / "shipped" / "digits.yaml", folder / "new" / "mine.yaml")
    return folder


def tried(line: str) -> list[str] | None:
    """The words to run: `train` checks everything and writes nothing; None for what takes minutes or a user's own data."""
    words = shlex.split(line)
    if words[0] == "train":
        return None if words[1].startswith("sd") else [*words, *([] if "--dry-run" in words else ["--dry-run"])]
    if words[0] in ("sample", "evaluate", "report", "mask", "export"):
        return words if words[1].removeprefix("runs/") in RUNS_ON else None
    if words[:2] == ["recipes", "copy"]:
        return [*words[:3], f"{words[2]}-{words[3]}"]
    return words if words[0] == "recipes" else None


@pytest.mark.parametrize("line", [line for line in OURS if tried(line)])
def test_it_works(line, scratch, monkeypatch, capsys):
    monkeypatch.setattr(
        "pecker_fast.runs.start.planned", lambda recipe, device: []
    )  # tests/runs/test_planning.py has it
    monkeypatch.chdir(scratch / "new" if line.startswith("train") else scratch)
    assert cli.main(tried(line)) == 0, capsys.readouterr().err
