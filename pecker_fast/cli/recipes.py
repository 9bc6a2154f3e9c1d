"""`recipes`: list, show, copy, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pecker_fast.cli.verb import HELP, add, at_home, examples, show
from pecker_fast.errors import OutputError

app = typer.Typer(context_settings=HELP)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List, show and copy the shipped recipes."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@examples("pecker-fast recipes list")
def recipes_list() -> None:
    """Names of the shipped recipes, with the first line of each."""
    from pecker_fast.files import read_text
    from pecker_fast.recipe import shipped_recipes

    rows = [(name, read_text(path).splitlines()[0].lstrip("# ")) for name, path in shipped_recipes().items()]
    show(rows, ("recipe", "what it does"))


@examples("pecker-fast recipes show digits", "pecker-fast recipes show digits --all")
def recipes_show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of a shipped recipe, or a YAML file.", callback=at_home)
    ],
    everything: Annotated[bool, typer.Option("--all", help="Every key with its value, defaults included.")] = False,
) -> None:
    """Print a recipe."""
    from pecker_fast.files import read_text
    from pecker_fast.recipe import load_recipe, recipe_to_yaml, shipped_recipes

    resolved = load_recipe(name)
    typer.echo(recipe_to_yaml(resolved) if everything else read_text(shipped_recipes().get(name, Path(name))), nl=False)


@examples("pecker-fast recipes copy digits", "pecker-fast recipes copy digits my.yaml")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.", callback=at_home)],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File to write; default: NAME.yaml.", callback=at_home)
    ] = None,
) -> None:
    """Copy a shipped recipe, to be changed. Never overwrites."""
    from pecker_fast.files import read_text, write_text
    from pecker_fast.recipe import load_recipe, shipped_recipes

    load_recipe(name)
    source = shipped_recipes().get(name, Path(name))
    target = destination or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise OutputError(f"{target}: exists already; give another file name")
    write_text(target, read_text(source))
    typer.echo(f"recipe: {target}")


@examples("pecker-fast recipes keys")
def recipes_keys() -> None:
    """Every recipe key with its type, default and meaning."""
    from pecker_fast.recipe import recipe_help

    rows = [
        (key, kind, "null" if default is None else str(default), text) for key, kind, default, text in recipe_help()
    ]
    show(rows, ("key", "type", "default", "meaning"))


@examples("pecker-fast recipes methods")
def recipes_methods() -> None:
    """Every method (`method=…`), with what comes out of it."""
    from pecker_fast.recipe import methods

    rows = [
        (name, keys.says, "one-step generator" if keys.one_step else "model of many steps")
        for name, keys in methods().items()
    ]
    show(rows, ("method", "what it does", "result"))


for _name, _verb in (
    ("list", recipes_list),
    ("show", recipes_show),
    ("copy", recipes_copy),
    ("keys", recipes_keys),
    ("methods", recipes_methods),
):
    add(app, _verb, _name)
