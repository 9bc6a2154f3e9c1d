"""The command line: its verbs in the order of the help, and how a failure ends. Heavy modules are imported by the verb
that needs them, so that help comes at once."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pecker_fast import __version__
from pecker_fast.cli import recipes
from pecker_fast.cli.audit import audit
from pecker_fast.cli.compare import compare
from pecker_fast.cli.export import export
from pecker_fast.cli.judge import evaluate, sample
from pecker_fast.cli.look import mask, report
from pecker_fast.cli.machine import bench, doctor
from pecker_fast.cli.pretrain import pretrain
from pecker_fast.cli.stopping import stoppable
from pecker_fast.cli.train import train
from pecker_fast.cli.verb import HELP, add, epilog
from pecker_fast.errors import PeckerError, Stopped, lack_of_memory
from pecker_fast.terminal import say, tolerant_streams

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

app = typer.Typer(
    name="pecker-fast",
    context_settings=HELP,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=epilog("pecker-fast train digits", "pecker-fast train digits forget=3 cover=8 output=runs/three"),
)
for _verb in (train, pretrain, sample, evaluate, audit, compare, report, mask, export, doctor, bench):
    add(app, _verb)
app.add_typer(recipes.app, name="recipes", epilog=epilog("pecker-fast recipes list", "pecker-fast recipes copy digits"))


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a user's mistake, 1 for ours, 128 + n after a signal."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    debug = os.environ.get("PECKER_DEBUG", "") not in ("", "0")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "RANK" in os.environ:  # the deepspeed launcher says it twice, and the second time as an argument
        given = [argument for argument in given if not argument.startswith("--local_rank=")]
    try:
        with tolerant_streams(), stoppable(for_good=arguments is None):
            return _run(given, debug)
    except Stopped as stopped:  # between two lines of ours
        return _stopped(stopped)


def _run(given: list[str], debug: bool) -> int:
    try:
        code = app(args=given, prog_name="pecker-fast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except Stopped as stopped:
        return _stopped(stopped)
    except PeckerError as error:
        if debug:
            traceback.print_exc()
        return error.exit_code if error.silent else _fail(str(error), error.exit_code)
    except typer.Abort:
        return _fail("aborted", 1)
    except Exception as error:
        if (lack := lack_of_memory(error)) is not None:
            return _fail(f"{lack}; use a smaller batch_size or fewer samples", 2)
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
        if (disk := _of_the_disk(error)) is not None:
            return _fail(disk, 2)
        text = " ".join(str(error).split())[:300]
        return _fail(f"internal error: {type(error).__name__}: {text}; run with PECKER_DEBUG=1 for the traceback", 1)


def _of_the_disk(error: Exception) -> str | None:
    """What is said of an error of the disk that nobody else has named; None for other errors."""
    from pecker_fast.files import disk_error

    found = disk_error(error)
    if found is None or found.errno not in DISK:
        return None
    where = f"{found.filename}: " if found.filename else ""
    return f"{where}{found.strerror}; free some space, or see to the disk, and try again"


def _stopped(stopped: Stopped) -> int:
    return _fail(str(stopped), 128 + stopped.signum)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    say(f"error: {message}")
    return code
