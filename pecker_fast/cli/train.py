"""`train`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pecker_fast.cli.verb import examples, show, tables_of_refusals


@examples(
    "pecker-fast train digits",
    "pecker-fast train digits forget=3 cover=8 mask.density=0.1 output=runs/three",
    "pecker-fast train digits method=sfd output=runs/sfd",
    "pecker-fast train sd15_celebrity --dry-run --device cuda:80GB",
    "pecker-fast train my.yaml lr=1e-5 steps=2000 --tensorboard",
)
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change; `recipes keys` lists them."),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what was found and the recipe, write nothing.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", help="With --dry-run: plan for cpu, cpu:16GB, cuda:80GB; default: what is here."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables; errors only.")] = False,
) -> None:
    """Run a recipe: saliency, mask, forgetting, evaluation, export, report. Continues where it stopped."""
    from pecker_fast.errors import RecipeError
    from pecker_fast.recipe import load_recipe, recipe_to_yaml

    if device is not None and not dry_run:
        raise RecipeError("--device: a run uses what is here; to plan for another device add --dry-run")
    if "RANK" not in os.environ:
        load_recipe(recipe, overrides or ())  # a mistake in it shows before anything heavy is imported
    from pecker_fast.machine.ranks import launched
    from pecker_fast.records import read_recipe
    from pecker_fast.runs import train as run_train

    with launched() as ranks:
        resolved = ranks.agree(lambda: read_recipe(recipe, overrides or ()))
        planned = {"device": device} if dry_run else {}
        with tables_of_refusals():
            result = run_train(resolved, tensorboard=tensorboard, quiet=quiet, dry_run=dry_run, ranks=ranks, **planned)
    if not ranks.is_first:
        return
    if dry_run:
        for name, value in result.found:
            typer.echo(f"# {name}: {value}")
        typer.echo(recipe_to_yaml(resolved), nl=False)
    elif not quiet:
        if result.metrics:
            from pecker_fast.report import metrics_table

            show(metrics_table(result.metrics))
        if result.audit:
            from pecker_fast.report import audit_table

            show(audit_table(result.audit))
            typer.echo(result.audit["verdict"])
        typer.echo(f"run folder: {result.run_dir}")
        if result.report is not None:
            typer.echo(f"report: {result.report}")
