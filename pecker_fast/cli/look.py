"""`report` and `mask`: what a run has written down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pecker_fast.cli.verb import RunFolder, at_home, examples, show
from pecker_fast.errors import DataError


@examples("pecker-fast report runs/digits")
def report(run: RunFolder) -> None:
    """Write report.html of a run again, and show what an iteration of it cost."""
    from pecker_fast.report import run_tables, write_report

    path = write_report(run)
    for table in run_tables(run):
        show(table)
    typer.echo(f"report: {path}")


@examples("pecker-fast mask runs/digits", "pecker-fast mask runs/digits --plot mask.png")
def mask(
    run: RunFolder,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG to write: density of each tensor.", callback=at_home)
    ] = None,
) -> None:
    """Show how many weights of each tensor the mask of a run keeps."""
    path = run / "mask.safetensors"
    if not path.exists():
        why = "the run has no mask (method sfd, or mask.source none)" if run.is_dir() else "no such run folder"
        raise DataError(f"{path}: not there; {why}")
    from pecker_fast.files import check_picture, check_tensors

    if plot is not None:
        check_picture(plot)
    check_tensors(path)
    from pecker_kernels import SaliencyMask

    from pecker_fast.report import mask_table, plot_mask

    loaded = SaliencyMask.load(str(path))
    if plot is not None:  # first, so that it is there even if the table's reader goes away, as `head` does
        plot_mask(loaded, plot)
    show(mask_table(loaded), ("tensor", "shape", "weights", "kept", "density"))
    if plot is not None:
        typer.echo(f"plot: {plot}")
