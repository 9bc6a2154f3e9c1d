"""`pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pecker_fast.cli.verb import at_home, examples, tables_of_refusals
from pecker_fast.errors import DataError, RecipeError

PRETRAIN_NAMES = ("digits", "cifar10", "stl10", "images", "shapes")


@examples(
    "pecker-fast pretrain digits",
    "pecker-fast pretrain cifar10 --data cifar-10-batches-bin",
    "pecker-fast pretrain images --data photos --size 64 --output runs/photos-teacher",
    "pecker-fast pretrain images --data photos --size 64 --batch-size 16 --channels 64,128,128,256 --steps 20000",
)
def pretrain(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"Data set: {', '.join(PRETRAIN_NAMES)}.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Binary CIFAR-10 or STL-10 distribution, or a folder of class folders.", callback=at_home
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Model folder to write.", callback=at_home)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps; default: the data set's own.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    distill_steps: Annotated[
        int | None,
        typer.Option("--distill-steps", help="Steps of distilling a one-step generator beside it; 0 = none."),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Pixels that the images of a folder are resized to.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images of a training step; default: the data set's own.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option("--channels", help="Channels of each level of the network, as 64,128,128.")
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without", help="Classes, or words of shapes, that the model never gets to know, as 0,3 or circle."
        ),
    ] = None,
    parts_of: Annotated[
        str | None,
        typer.Option("--parts-of", help="Finished model (folder or shipped name) whose VAE and judges are taken over."),
    ] = None,
) -> None:
    """Train a teacher, and the classifier that judges it, from your own copy of a data set."""
    if name not in PRETRAIN_NAMES:
        from pecker_fast.recipe import closest

        close = closest(name, PRETRAIN_NAMES)
        hint = f", did you mean {close}?" if close else ""
        raise DataError(f"pretrain {name}: no such data set{hint} (one of {', '.join(PRETRAIN_NAMES)})")
    from pecker_fast.pretrain import pretrain as run_pretrain

    wide = widths(channels)
    with tables_of_refusals():
        folder = run_pretrain(
            name, data=data, output=output, steps=steps, seed=seed, distill_steps=distill_steps, size=size,
            batch_size=batch_size, channels=wide, without=(without,) if without == "" else without or (),
            parts_of=parts_of,
        )  # fmt: skip
    typer.echo(f"model folder: {folder}")


def widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--channels: expected numbers such as 64,128,128, got {text[:60]!r}") from None
