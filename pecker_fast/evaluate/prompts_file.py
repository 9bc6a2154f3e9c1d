"""Prompt files to evaluate with: a prompt a line, or a CSV with a column of prompts, as I2P's is."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

from pecker_fast.errors import DataError
from pecker_fast.files import read_text

SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")  # the first that is there counts


class PromptFile(NamedTuple):
    """Prompts in the order of the file; seeds and categories, one entry a prompt, where it has such a column."""

    texts: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    categories: tuple[tuple[str, ...], ...] | None = None


def read_prompts(path: str | Path) -> PromptFile:
    """Read a prompt file.

    Text (UTF-8): one prompt a line; blank lines and lines that start with # are skipped. A file named *.csv: the
    columns `prompt`, and if they are there `evaluation_seed`, `sd_seed` or `seed` (whole numbers from 0 to 2⁶³ − 1) and
    `categories` (names with commas between); other columns are ignored, rows without any text skipped. White space
    inside a prompt becomes single spaces.

    Raises:
        DataError: the file is missing, not UTF-8, holds no prompt, or a row is not what it should be; names the line.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except DataError as error:
        cause = error.__context__  # the decoder's own error still holds the bytes, and with them the line
        if not isinstance(cause, UnicodeDecodeError):
            raise
        line = cause.object.count(b"\n", 0, cause.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    found = _rows(path, text) if path.suffix.lower() == ".csv" else PromptFile(tuple(_lines(text)))
    if not found.texts:
        last = max(1, len(text.splitlines()))
        raise DataError(f"{path}, line {last}: the file ends without a single prompt; give one a line")
    return found


def _lines(text: str) -> list[str]:
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _rows(path: Path, text: str) -> PromptFile:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    texts: list[str] = []
    seeds: list[int] = []
    categories: list[tuple[str, ...]] = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "prompt" not in header:
            raise DataError(f"{path}, line 1: no column named prompt; the columns are {', '.join(header) or 'none'}")
        seed_column = next((name for name in SEED_COLUMNS if name in header), None)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} cells under {len(header)} columns; is a comma not quoted?")
            row = dict(zip(header, cells))
            texts.append(" ".join(row["prompt"].split()))
            if not texts[-1]:
                raise DataError(f"{where}: the prompt is empty; fill it in or remove the row")
            if seed_column is not None:
                seeds.append(_seed(where, seed_column, row[seed_column].strip()))
            if "categories" in row:
                names = (name.strip() for name in row["categories"].split(","))
                categories.append(tuple(name for name in names if name))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV file: {error}") from None
    return PromptFile(
        tuple(texts),
        tuple(seeds) if seed_column is not None else None,
        tuple(categories) if "categories" in header else None,
    )


def _seed(where: str, column: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) <= 19 and int(cell) < 1 << 63):
        raise DataError(f"{where}: {column} {cell[:40]!r} is no whole number from 0 to 2^63 - 1")
    return int(cell)
