"""The command line. Heavy modules are imported by the command that needs them, so that help comes at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pecker_fast import __version__
from pecker_fast.errors import DataError, OutputError, PeckerError, RecipeError

HELP = {"help_option_names": ["-h", "--help"]}
PRETRAIN_NAMES = ("digits", "cifar10", "stl10", "images", "shapes")


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="pecker-fast",
    context_settings=HELP,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=_examples("pecker-fast train digits", "pecker-fast train digits forget=3 cover=8 output=runs/three"),
)
recipes_app = typer.Typer(context_settings=HELP)
app.add_typer(
    recipes_app, name="recipes", epilog=_examples("pecker-fast recipes list", "pecker-fast recipes copy digits")
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as written by `train`.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pecker-fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make a diffusion model forget a class."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog=_examples(
        "pecker-fast train digits",
        "pecker-fast train digits forget=3 cover=8 mask.density=0.1 output=runs/three",
        "pecker-fast train digits method=sfd output=runs/sfd",
        "pecker-fast train my.yaml lr=1e-5 steps=2000 --tensorboard",
    )
)
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change; `recipes keys` lists them."),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the recipe, write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables; errors only.")] = False,
) -> None:
    """Run a recipe: saliency, mask, forgetting, evaluation, export, report. Continues where it stopped."""
    from pecker_fast.recipe import load_recipe, recipe_to_yaml

    if "RANK" not in os.environ:
        load_recipe(recipe, overrides or ())  # a mistake in it shows before anything heavy is imported
    from pecker_fast.machine.ranks import launched
    from pecker_fast.runs import train as run_train

    with launched() as ranks:
        resolved = ranks.agree(lambda: load_recipe(recipe, overrides or ()))
        result = run_train(resolved, tensorboard=tensorboard, quiet=quiet, dry_run=dry_run, ranks=ranks)
    if not ranks.is_first:
        return
    if dry_run:
        typer.echo(recipe_to_yaml(resolved), nl=False)
    elif not quiet:
        if result.metrics:
            from pecker_fast.report import metrics_table

            _show(metrics_table(result.metrics))
        typer.echo(f"run folder: {result.run_dir}")
        if result.report is not None:
            typer.echo(f"report: {result.report}")


@app.command(
    epilog=_examples(
        "pecker-fast pretrain digits",
        "pecker-fast pretrain cifar10 --data cifar-10-batches-bin",
        "pecker-fast pretrain images --data photos --size 64 --output runs/photos-teacher",
    )
)
def pretrain(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"Data set: {', '.join(PRETRAIN_NAMES)}.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Binary CIFAR-10 or STL-10 distribution, or a folder of class folders."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Model folder to write.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps; default: the data set's own.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    distill_steps: Annotated[
        int | None,
        typer.Option("--distill-steps", help="Steps of distilling a one-step generator beside it; 0 = none."),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Pixels that the images of a folder are resized to.")
    ] = None,
) -> None:
    """Train a teacher, and the classifier that judges it, from your own copy of a data set."""
    if name not in PRETRAIN_NAMES:
        from pecker_fast.recipe import closest

        close = closest(name, PRETRAIN_NAMES)
        hint = f", did you mean {close}?" if close else ""
        raise DataError(f"pretrain {name}: no such data set{hint} (one of {', '.join(PRETRAIN_NAMES)})")
    from pecker_fast.pretrain import pretrain as run_pretrain

    folder = run_pretrain(
        name, data=data, output=output, steps=steps, seed=seed, distill_steps=distill_steps, size=size
    )
    typer.echo(f"model folder: {folder}")


@app.command(
    epilog=_examples(
        "pecker-fast sample runs/digits",
        "pecker-fast sample runs/digits --classes 0,1 --count 16 --output grid.png",
        "pecker-fast sample runs/digits --before",
        'pecker-fast sample runs/shapes --prompt "a red circle on the left" --prompt "a blue star" --seed 3',
    )
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
        Path | None, typer.Option("--output", "-o", help="PNG to write; default: in the run folder.")
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="The model before forgetting.")] = False,
) -> None:
    """Draw a grid of images with the model of a run."""
    chosen = _class_list(classes)
    from pecker_fast.runs import sample_run

    path = sample_run(run, classes=chosen, count=count, seed=seed, output=output, before=before, prompts=prompt)
    typer.echo(f"images: {path}")


@app.command(
    epilog=_examples(
        "pecker-fast evaluate runs/digits",
        "pecker-fast evaluate runs/digits --samples 5000 --seed 1",
        "pecker-fast evaluate runs/shapes --protocol classes",
        "pecker-fast evaluate runs/sd15 --protocol celebrity --prompts people.txt --detector my_detector:faces",
    )
)
def evaluate(
    run: RunFolder,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images; default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the images; default: the run's.")] = None,
    judge: Annotated[Path | None, typer.Option("--judge", help="Folder of another classifier to judge by.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="celebrity, i2p or classes: how a concept is judged (docs/concepts.md)."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompt file of the protocol; default: the run's forget prompts.")
    ] = None,
    detector: Annotated[
        list[str] | None, typer.Option("--detector", help="Judge folder or module:function; i2p takes several.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Images of each prompt of the protocol.")] = None,
    before: Annotated[bool, typer.Option("--before", help="With --protocol: the model before forgetting.")] = False,
) -> None:
    """Judge the model of a run again, with other images or another judge, or by a protocol for concepts."""
    if protocol is not None:
        if judge is not None:
            raise RecipeError("--judge: a protocol is judged by --detector; leave one out")
        from pecker_fast.evaluate import TABLE_HEADER, protocol_table
        from pecker_fast.runs import evaluate_protocol

        figures = evaluate_protocol(run, protocol, detector or (), prompts, seeds, samples, seed, before)
        _show(protocol_table(figures), TABLE_HEADER)
        return
    given = {"--prompts": prompts, "--detector": detector, "--seeds": seeds, "--before": before}
    if used := [name for name, value in given.items() if value]:
        raise RecipeError(f"{used[0]}: needs --protocol celebrity, i2p or classes")
    from pecker_fast.report import metrics_table
    from pecker_fast.runs import evaluate_run

    _show(metrics_table(evaluate_run(run, samples=samples, seed=seed, judge=judge)))


@app.command(epilog=_examples("pecker-fast report runs/digits"))
def report(run: RunFolder) -> None:
    """Write report.html of a run again, and show what an iteration of it cost."""
    from pecker_fast.report import run_tables, write_report

    path = write_report(run)
    for table in run_tables(run):
        _show(table)
    typer.echo(f"report: {path}")


@app.command(epilog=_examples("pecker-fast mask runs/digits", "pecker-fast mask runs/digits --plot mask.png"))
def mask(
    run: RunFolder,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG to write: density of each tensor.")] = None,
) -> None:
    """Show how many weights of each tensor the mask of a run keeps."""
    path = run / "mask.safetensors"
    if not path.exists():
        why = "the run has no mask (method sfd, or mask.source none)" if run.is_dir() else "no such run folder"
        raise DataError(f"{path}: not there; {why}")
    from pecker_fast.files import check_tensors

    check_tensors(path)
    from pecker_kernels import SaliencyMask

    from pecker_fast.report import mask_table, plot_mask

    loaded = SaliencyMask.load(str(path))
    if plot is not None:  # first, so that it is there even if the table's reader goes away, as `head` does
        plot_mask(loaded, plot)
    _show(mask_table(loaded), ("tensor", "shape", "weights", "kept", "density"))
    if plot is not None:
        typer.echo(f"plot: {plot}")


@app.command(
    epilog=_examples(
        "pecker-fast export runs/digits",
        "pecker-fast export runs/digits --weights raw --output model",
        "pecker-fast export runs/shapes --format delta --output circle.safetensors",
        "pecker-fast export apply circle.safetensors BASE --output model",
    )
)
def export(
    what: Annotated[
        list[str],
        typer.Argument(metavar="RUN | apply DELTA BASE", help="Run folder; or a delta and the model it is of."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file to write; default: in the run.")
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="ema (averaged) or raw.")] = "ema",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="diffusers (folder), unet (its weights), single (checkpoint in the original layout), delta (what changed).",
        ),
    ] = "diffusers",
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

    path = export_run(Path(what[0]), output=output, weights=weights, form=form)
    typer.echo(f"{'pipeline' if form == 'diffusers' else form}: {path}")


@app.command(
    epilog=_examples(
        "pecker-fast doctor", "pecker-fast doctor digits", "pecker-fast doctor sd15_celebrity score=lora batch_size=1"
    )
)
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Also check what this recipe needs.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change.")] = None,
) -> None:
    """Show versions, backends, what is missing, and the memory a recipe will take. Exits with 1 if something must be mended."""
    from pecker_fast.machine import doctor as examine
    from pecker_fast.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or ()) if recipe else None
    checks = examine(resolved)
    _show(
        [(check.name, check.state, check.found, check.remedy) for check in checks], ("part", "state", "found", "remedy")
    )
    if resolved is not None and not any(check.name == "model" and check.state == "missing" for check in checks):
        from pecker_fast.runs import check_memory

        prediction = None if resolved.engine.zero else check_memory(resolved)
        if resolved.engine.zero:
            typer.echo("memory: not predicted for many ranks; docs/scaling.md has the formula")
        elif prediction is None:
            typer.echo("memory: not known before the model is fetched from the hub")
        else:
            _show(prediction.table(), ("memory (predicted)", "bytes"))
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "pecker-fast bench",
        "pecker-fast bench digits update_rule=salient_only mask.density=0.1",
        "pecker-fast bench my.yaml --iterations 30 --json bench.json",
    )
)
def bench(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file; default: digits.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change.")] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Timed iterations of each variant.")] = 10,
    json: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
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
        _show(table)
    if not any(account["energy_j"] for account in found["variants"].values()):
        typer.echo("energy: not measured (it takes a GPU with NVML, and the package nvidia-ml-py)")
    if json is not None:
        typer.echo(f"figures: {json}")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List, show and copy the shipped recipes."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@recipes_app.command("list", epilog=_examples("pecker-fast recipes list"))
def recipes_list() -> None:
    """Names of the shipped recipes, with the first line of each."""
    from pecker_fast.files import read_text
    from pecker_fast.recipe import shipped_recipes

    rows = [(name, read_text(path).splitlines()[0].lstrip("# ")) for name, path in shipped_recipes().items()]
    _show(rows, ("recipe", "what it does"))


@recipes_app.command(
    "show", epilog=_examples("pecker-fast recipes show digits", "pecker-fast recipes show digits --all")
)
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe, or a YAML file.")],
    everything: Annotated[bool, typer.Option("--all", help="Every key with its value, defaults included.")] = False,
) -> None:
    """Print a recipe."""
    from pecker_fast.files import read_text
    from pecker_fast.recipe import load_recipe, recipe_to_yaml, shipped_recipes

    resolved = load_recipe(name)
    typer.echo(recipe_to_yaml(resolved) if everything else read_text(shipped_recipes().get(name, Path(name))), nl=False)


@recipes_app.command(
    "copy", epilog=_examples("pecker-fast recipes copy digits", "pecker-fast recipes copy digits my.yaml")
)
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File to write; default: NAME.yaml.")
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


@recipes_app.command("keys", epilog=_examples("pecker-fast recipes keys"))
def recipes_keys() -> None:
    """Every recipe key with its type, default and meaning."""
    from pecker_fast.recipe import recipe_help

    rows = [
        (key, kind, "null" if default is None else str(default), text) for key, kind, default, text in recipe_help()
    ]
    _show(rows, ("key", "type", "default", "meaning"))


def _class_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--classes: expected numbers such as 0,1,2, got {text!r}") from None


def _show(table: Any, header: Sequence[str] = ()) -> None:
    """Print a rich renderable, or rows under a header: a table on a terminal, tab-separated lines elsewhere."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe: nothing is cut to the 80 columns of an imagined screen
    if hasattr(table, "__rich_console__") or hasattr(table, "__rich__") or isinstance(table, str):
        console.print(table, markup=False, highlight=False) if isinstance(table, str) else console.print(table)
        return
    rows: Iterable[Sequence[Any]] = [[_cell(value) for value in row] for row in table]
    if not console.is_terminal:
        for row in [header, *rows] if header else rows:
            typer.echo("\t".join(row).rstrip("\t"))
        return
    drawn = Table(*header, show_header=bool(header))
    for row in rows:
        drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(drawn)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a user's mistake, 1 for ours, 128 + n after a signal."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    debug = os.environ.get("PECKER_DEBUG", "") not in ("", "0")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "RANK" in os.environ:  # the deepspeed launcher says it twice, and the second time as an argument
        given = [argument for argument in given if not argument.startswith("--local_rank=")]
    try:
        code = app(args=given, prog_name="pecker-fast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except PeckerError as error:
        if debug:
            traceback.print_exc()
        return error.exit_code if error.silent else _fail(str(error), error.exit_code)
    except typer.Abort:
        return _fail("aborted", 1)
    except MemoryError:
        return _fail("out of memory; use a smaller batch_size or fewer samples", 2)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(
            error, "exit_code"
        ):  # the parser's own: an option misspelt, say
            if os.environ.get("RANK", "0") != "0":
                return error.exit_code  # all ranks of a run were given the same options
            return _fail(" ".join(f"{error.format_message()}".split()), error.exit_code)
        if debug:
            traceback.print_exc()
        kernels: Any = sys.modules.get("pecker_kernels.errors")
        if kernels is not None and isinstance(error, kernels.PeckerKernelsError):
            return _fail(" ".join(str(error).split()), 2)
        text = " ".join(str(error).split())[:300]
        return _fail(f"internal error: {type(error).__name__}: {text}; run with PECKER_DEBUG=1 for the traceback", 1)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    return code
