"""What the verbs share: examples below their help, the run folder as an argument, tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from pecker_fast.errors import DataError, PeckerError
from pecker_fast.terminal import table_console


def at_home(value: Any) -> Any:
    """Callback of everything that names files: `~` at the start is the home folder. Raises DataError."""
    if isinstance(value, list | tuple):
        return [at_home(one) for one in value]
    if not isinstance(value, str | Path):
        return value
    from pecker_fast import files

    try:
        return type(value)(files.at_home(str(value)))
    except ValueError as reason:
        raise DataError(f"{value}: {reason}") from None


HELP = {"help_option_names": ["-h", "--help"]}
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as written by `train`.", callback=at_home)]
Verb = TypeVar("Verb", bound=Callable[..., None])
_EPILOGS: dict[Callable[..., None], str] = {}


def epilog(*lines: str) -> str:
    """The text below a help page."""
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)])


def examples(*lines: str) -> Callable[[Verb], Verb]:
    """Decorator of a verb: the examples below its help."""

    def keep(verb: Verb) -> Verb:
        _EPILOGS[verb] = epilog(*lines)
        return verb

    return keep


def add(app: typer.Typer, verb: Callable[..., None], name: str | None = None) -> None:
    """Make a command of a verb; name: None = the function's."""
    app.command(name, epilog=_EPILOGS[verb])(verb)


def show(table: Any, header: Sequence[str] = ()) -> None:
    """Print a rich renderable, or rows under a header: a table on a terminal, tab-separated lines elsewhere."""
    from rich.table import Table

    console = table_console()
    if hasattr(table, "__rich_console__") or hasattr(table, "__rich__") or isinstance(table, str):
        console.print(table, markup=False, highlight=False) if isinstance(table, str) else console.print(table)
        return
    rows: Iterable[Sequence[Any]] = [[_cell(value) for value in row] for row in table]
    if not console.is_terminal:
        for row in [header, *rows] if header else rows:
            console.file.write("\t".join(row).rstrip("\t") + "\n")
        console.file.flush()
        return
    drawn = Table(*header, show_header=bool(header))
    for row in rows:
        drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(drawn)


@contextlib.contextmanager
def tables_of_refusals() -> Iterator[None]:
    """Inside, an error that brings a table has it printed before it goes on."""
    try:
        yield
    except PeckerError as error:
        if (table := getattr(error, "table", None)) is not None:
            show(table, ("memory (predicted)", "bytes"))
        raise


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
