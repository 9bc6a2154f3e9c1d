"""`audit`: hidden or forgotten?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pecker_fast.cli.judge import check_file
from pecker_fast.cli.verb import at_home, examples, show
from pecker_fast.errors import RecipeError


@examples(
    "pecker-fast audit runs/digits --against digits_without_0",
    "pecker-fast audit runs/digits --probes condition,relearn --budget quick",
    "pecker-fast audit runs/shapes --against shapes_without_circle --prompts sayings.txt",
    "pecker-fast audit my-pipeline --recipe digits --output runs/my-audit",
)
def audit(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="Run folder, or a model's folder with --recipe.", callback=at_home),
    ],
    probes: Annotated[
        str | None, typer.Option("--probes", help="Some of the probes, as condition,relearn; default: all.")
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="quick, standard or strong.")] = "standard",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="Run or model that never knew the concept; may be given again.", callback=at_home
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=20, help="Images of a figure; default: the budget's.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything the audit draws.")] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File with the concept in other words, a prompt a line.", callback=at_home),
    ] = None,
    second_judge: Annotated[
        Path | None,
        typer.Option(
            "--second-judge",
            help="Model folder whose second_judge/ has to agree; default: the run's.",
            callback=at_home,
        ),
    ] = None,
    controls_of: Annotated[
        Path | None,
        typer.Option(
            "--controls-of",
            help="Run whose audit had the very same controls: they are not run again.",
            callback=at_home,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Of a model's folder: what of which model it was to forget.", callback=at_home),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of audit.json; default: the run's.", callback=at_home)
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File to write the record to.", callback=at_home)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table; errors only.")] = False,
) -> None:
    """Attack the result, and controls beside it: is the concept hidden, or forgotten?"""
    check_file(json, "probes")
    from pecker_fast.recipe import load_recipe
    from pecker_fast.report import audit_table, write_report
    from pecker_fast.runs import Asked, audit_run

    if probes is not None and not all(name.strip() for name in probes.split(",")):
        raise RecipeError(f"--probes: expected names such as condition,relearn, got {probes!r}")
    asked = Asked(
        tuple(name.strip() for name in probes.split(",")) if probes else (), budget, tuple(against or ()), samples, seed,
        str(prompts) if prompts is not None else None, str(second_judge) if second_judge is not None else None,
        str(controls_of) if controls_of is not None else None,
    )  # fmt: skip
    found = audit_run(run, asked, load_recipe(recipe) if recipe is not None else None, output, quiet)
    if json is not None:
        from pecker_fast.files import write_json

        write_json(json, found)
    if quiet:
        return
    show(audit_table(found))
    typer.echo(found["verdict"])
    into = output or (Path(run) if recipe is None else None)
    if into is not None:
        typer.echo(f"audit: {into / 'audit.json'}")
    if recipe is None and output is None:
        typer.echo(f"report: {write_report(run)}")
