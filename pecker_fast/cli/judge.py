"""`sample` and `evaluate`: look at the model of a run, and judge it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pecker_fast.cli.verb import RunFolder, at_home, examples, show
from pecker_fast.errors import OutputError, RecipeError


@examples(
    "pecker-fast sample runs/digits",
    "pecker-fast sample runs/digits --classes 0,1 --count 16 --output grid.png",
    "pecker-fast sample runs/digits --before",
    'pecker-fast sample runs/shapes --prompt "a red circle on the left" --prompt "a blue star" --seed 3',
)
def sample(
    run: RunFolder,
    classes: Annotated[str | None, typer.Option("--classes", help="Classes, as 0,1,2; default: all.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text to draw, may be given again; default: the run's own prompts."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Images of each class or prompt.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write; default: in the run folder.", callback=at_home)
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="The model before forgetting.")] = False,
) -> None:
    """Draw a grid of images with the model of a run."""
    chosen = class_list(classes)
    from pecker_fast.runs import sample_run

    path = sample_run(run, classes=chosen, count=count, seed=seed, output=output, before=before, prompts=prompt)
    typer.echo(f"images: {path}")


@examples(
    "pecker-fast evaluate runs/digits",
    "pecker-fast evaluate runs/digits --samples 5000 --seed 1 --all --json figures.json",
    "pecker-fast evaluate runs/shapes --protocol classes",
    "pecker-fast evaluate runs/sd15 --protocol i2p --prompts i2p.csv --detector nudenet",
    "pecker-fast evaluate runs/sd15 --protocol clip --clip models/clip-vit-large-patch14",
    "pecker-fast evaluate runs/sd15 --protocol celebrity --prompts people.txt --detector my_detector:faces",
)
def evaluate(
    run: RunFolder,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images; default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the images; default: the run's.")] = None,
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Folder of another classifier to judge by.", callback=at_home)
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="celebrity, i2p, classes, clip, unlearncanvas: how a concept is judged (docs/concepts.md).",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="Prompt file of the protocol; default: the run's forget prompts.", callback=at_home
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option("--detector", help="Judge folder or module:function; i2p takes several.", callback=at_home),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Images of each prompt of the protocol.")] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="Folder of a CLIP model, for --protocol clip.", callback=at_home)
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="With --protocol: the model before forgetting.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also draw the model before forgetting and the teacher again, all alike.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.", callback=at_home)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Add the figures to evaluations.jsonl of the run.")] = False,
) -> None:
    """Judge the model of a run again, with other images or another judge, or by a protocol for concepts."""
    check_file(json, "after" if protocol is None else "protocol")
    if protocol is not None:
        if judge is not None:
            raise RecipeError("--judge: a protocol is judged by --detector; leave one out")
        if everything:
            raise RecipeError("--all: a protocol judges one model; use --before for the model before forgetting")
        from pecker_fast.evaluate import TABLE_HEADER, protocol_table
        from pecker_fast.runs import evaluate_protocol

        figures = evaluate_protocol(run, protocol, detector or (), prompts, seeds, samples, seed, before, clip)
        kept(figures, run if keep else None, json)
        show(protocol_table(figures), TABLE_HEADER)
        return
    given = {"--prompts": prompts, "--detector": detector, "--seeds": seeds, "--clip": clip, "--before": before}
    if used := [name for name, value in given.items() if value]:
        raise RecipeError(f"{used[0]}: needs --protocol celebrity, i2p, classes, clip or unlearncanvas")
    from pecker_fast.report import metrics_table
    from pecker_fast.runs import evaluate_run

    found = evaluate_run(run, samples=samples, seed=seed, judge=judge, everything=everything)
    kept(found, run if keep else None, json)
    show(metrics_table(found))


def check_file(path: Path | None, key: str) -> None:
    """Raises OutputError, before anything is drawn, where no file can be written or one is that is none of ours (`key`)."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise OutputError(f"--json {path}: not a file in a folder that is there; give another")
    if path is not None:
        from pecker_fast.files import check_json

        check_json(path, (key,))


def kept(figures: dict[str, Any], run: Path | None, json: Path | None) -> None:
    """Keep figures where that was asked for, and say where."""
    if run is None and json is None:
        return
    from pecker_fast.runs import keep_figures

    for path in keep_figures(figures, run, json):
        typer.echo(f"figures: {path}")


def class_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--classes: expected numbers such as 0,1,2, got {text!r}") from None
