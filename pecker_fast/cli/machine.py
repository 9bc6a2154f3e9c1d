"""`doctor` and `bench`: what the machine has, and what an iteration costs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pecker_fast.cli.verb import at_home, examples, show, tables_of_refusals
from pecker_fast.errors import RecipeError


@examples(
    "pecker-fast doctor",
    "pecker-fast doctor digits",
    "pecker-fast doctor sd15_celebrity score=lora --device cuda:24GB",
)
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Also check what this recipe needs.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change.")] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Plan for this device: cpu, cpu:16GB, cuda:80GB; default: what is here."),
    ] = None,
) -> None:
    """Show versions, backends, what is missing, and the memory and time a recipe will take. Exits with 1 if something must be
    mended."""
    from pecker_fast.machine import device_of
    from pecker_fast.machine import doctor as examine
    from pecker_fast.recipe import load_recipe

    if device is not None:
        device_of(device)
        if recipe is None:
            raise RecipeError("--device: plans for a recipe; name one")

    resolved = load_recipe(recipe, overrides or ()) if recipe else None
    checks = examine(resolved)
    show(
        [(check.name, check.state, check.found, check.remedy) for check in checks], ("part", "state", "found", "remedy")
    )
    if resolved is not None and not any(check.name == "model" and check.state == "missing" for check in checks):
        from pecker_fast.runs import plan_rows

        with tables_of_refusals():
            times, memory = plan_rows(resolved, device)
        show(times, ("plan", "time (estimated)"))
        if len(memory) == 1:
            typer.echo(": ".join(memory[0]))
        else:
            show(memory, ("memory (predicted)", "bytes"))
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(1)


@examples(
    "pecker-fast bench",
    "pecker-fast bench digits update_rule=salient_only mask.density=0.1",
    "pecker-fast bench my.yaml --iterations 30 --json bench.json",
)
def bench(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file; default: digits.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change.")] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Timed iterations of each variant.")] = 10,
    json: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.", callback=at_home)] = None,
) -> None:
    """Measure one iteration, part by part: without a mask beside the recipe's own. Trains nothing, keeps nothing."""
    from pecker_fast.recipe import load_recipe

    name, given = recipe or "digits", list(overrides or ())
    if "=" in name and not Path(name).exists():
        name, given = "digits", [name, *given]
    resolved = load_recipe(name, given)
    from pecker_fast.report import parts_tables
    from pecker_fast.runs import bench as measure

    found = measure(resolved, iterations, json)
    for table in parts_tables(found["variants"]):
        show(table)
    if not any(account["energy_j"] for account in found["variants"].values()):
        typer.echo("energy: not measured (it takes a GPU with NVML, and the package nvidia-ml-py)")
    if json is not None:
        typer.echo(f"figures: {json}")
