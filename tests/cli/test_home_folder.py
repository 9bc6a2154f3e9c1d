"""`~` at the start of whatever names a file or a folder on the command line is the home folder, and never a folder named ~."""

import typing
from pathlib import Path

import pytest

from pecker_fast import cli
from pecker_fast.cli import entry, recipes
from pecker_fast.cli.verb import at_home

VERBS = [
    entry.train,
    entry.pretrain,
    entry.sample,
    entry.evaluate,
    entry.report,
    entry.mask,
    entry.export,
    entry.doctor,
]
VERBS += [entry.bench, recipes.recipes_show, recipes.recipes_copy]


def path_parameters():
    for verb in VERBS:
        for name, hint in typing.get_type_hints(verb, include_extras=True).items():
            annotated = next((h for h in (hint, *typing.get_args(hint)) if hasattr(h, "__metadata__")), None)
            if annotated is not None and Path in (annotated.__origin__, *typing.get_args(annotated.__origin__)):
                yield pytest.param(annotated.__metadata__[0], id=f"{verb.__name__}-{name}")


@pytest.mark.parametrize("parameter", path_parameters())
def test_every_path_of_the_command_line(parameter):
    assert parameter.callback is at_home


def test_there_are_paths():
    assert len(list(path_parameters())) > 10


def test_paths_and_lists_of_texts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home(Path("~/x")) == tmp_path / "x"
    assert at_home(["apply", "~/d", "a~"]) == ["apply", f"{tmp_path}/d", "a~"]
    assert at_home(None) is None


def test_a_home_folder_that_is_not_there_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", "digits", "~nobody-at-all/r.yaml"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ~nobody-at-all/r.yaml: there is no home folder '~nobody-at-all'")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["recipes", "copy", "digits", "~/r.yaml"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
