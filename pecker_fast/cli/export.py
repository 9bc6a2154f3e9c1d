"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pecker_fast.cli.verb import at_home, examples
from pecker_fast.errors import RecipeError


@examples(
    "pecker-fast export runs/digits",
    "pecker-fast export runs/digits --weights raw --output model",
    "pecker-fast export runs/shapes --format delta --output circle.safetensors",
    "pecker-fast export runs/celebrity --format lora --rank 16 --names kohya",
    "pecker-fast export apply circle.safetensors BASE --output model",
)
def export(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN | apply DELTA BASE", help="Run folder; or a delta and the model it is of.", callback=at_home
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder or file to write; default: in the run.", callback=at_home),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="ema (averaged) or raw.")] = "ema",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="diffusers (folder), unet (its weights), single (checkpoint in the original layout), delta (what changed), lora.",
        ),
    ] = "diffusers",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of a LoRA file; default: 32.")] = None,
    names: Annotated[
        str | None, typer.Option("--names", help="Of a LoRA file's tensors: diffusers (default) or kohya (ComfyUI).")
    ] = None,
) -> None:
    """Write the model of a run, as a folder or a file; or apply a delta file to the model it was made from."""
    if what[0] == "apply":
        if len(what) != 3 or output is None:
            raise RecipeError("export apply: give DELTA, BASE and --output, as `pecker-fast export apply D B -o OUT`")
        from pecker_fast.runs import apply_delta_file

        typer.echo(f"model: {apply_delta_file(what[1], what[2], output)}")
        return
    if len(what) != 1:
        raise RecipeError(f"export: one run folder expected, got {' '.join(what)[:120]!r}")
    if weights not in ("ema", "raw"):
        raise RecipeError(f"--weights: expected ema or raw, got {weights!r}")
    from pecker_fast.runs import export_run

    if form != "lora" and (rank is not None or names is not None):
        raise RecipeError(f"--rank, --names: belong to --format lora, not to {form}; leave them out")
    lora: dict[str, Any] = {"rank": rank or 32, "names": names or "diffusers"} if form == "lora" else {}
    path = export_run(Path(what[0]), output=output, weights=weights, form=form, **lora)
    typer.echo(f"{'pipeline' if form == 'diffusers' else form}: {path}")
