"""`compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pecker_fast.cli.verb import at_home, examples, show


@examples(
    "pecker-fast compare digits --methods pecker,spare,salun,relabel",
    "pecker-fast compare digits forget=3 cover=8 --methods pecker,spare --seeds 3 --output runs/three",
    "pecker-fast compare shapes --methods pecker,spare,uce,sld --never shapes_without_circle",
)
def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change, for all methods.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", help="Names with commas between; `recipes methods` lists them; and sld, for prompts."
        ),
    ] = "pecker,sfd,spare,relabel",
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each method, with seeds 0, 1, …")] = 1,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the runs and the tables.", callback=at_home)
    ] = Path("runs/compare"),
    never: Annotated[
        str | None, typer.Option("--never", help="A model that never knew what is forgotten, for a row beside.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table; errors only.")] = False,
) -> None:
    """Train one task by several methods and print one table. Continues where it stopped."""
    from pecker_fast.report import comparison_table, write_comparison
    from pecker_fast.runs import COMPARED, compare_methods

    names = [name.strip() for name in methods.split(",") if name.strip()]
    say = (lambda line: None) if quiet else typer.echo
    found = compare_methods(recipe, names, seeds=seeds, output=output, overrides=overrides or (), never=never, say=say)
    page = write_comparison(found, COMPARED, output)
    if quiet:
        return
    head, *rows = comparison_table(found["rows"], COMPARED)
    show(rows, head)
    typer.echo(f"report: {page}")
