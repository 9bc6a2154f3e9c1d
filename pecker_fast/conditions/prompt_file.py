"""Prompt files, to train with and to evaluate with: a prompt a line, or a table (CSV, TSV) with a column of prompts."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pecker_fast.conditions.words import filled
from pecker_fast.errors import DataError, RecipeError
from pecker_fast.files import read_text

SUFFIXES = (".txt", ".csv", ".tsv")
PROMPT_COLUMNS = ("prompt", "caption", "text")  # the first that is there counts
SEED_COLUMNS = ("evaluation_seed", "sd_seed", "seed")  # likewise


class PromptFile(NamedTuple):
    """Prompts in the order of the file; seeds and categories, one entry a prompt, where it has such a column."""

    texts: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    categories: tuple[tuple[str, ...], ...] | None = None


def read_prompts(path: str | Path) -> PromptFile:
    """Read a prompt file.

    Text (UTF-8): one prompt a line; blank lines and lines that start with # are skipped. A file named *.csv or *.tsv: the
    column `prompt`, `caption` or `text`, and if they are there `evaluation_seed`, `sd_seed` or `seed` (whole numbers from 0
    to 2⁶³ − 1) and `categories` (names with commas between); other columns are ignored, rows without any text skipped.
    Cells of a CSV are parted by commas, or by the semicolons or tabs that its header has. White space inside a prompt
    becomes single spaces, characters their composed form.

    Raises:
        DataError: the file is missing, not UTF-8, holds no prompt, or a row is not what it should be; names the line.
    """
    found, _ = numbered_prompts(path)
    if not found.texts:
        last = max(1, len(read_text(path).splitlines()))
        raise DataError(f"{path}, line {last}: the file ends without a single prompt; give one a line")
    return found


def placed(file: PromptFile, names: Sequence[str]) -> PromptFile:
    """The file with each of `names` in turn in the place of {}, seeds and categories with their prompts.

    Raises RecipeError where {} stands for nothing, or is no word of its own.
    """
    if not any("{}" in text for text in file.texts):
        return file
    if not names:
        raise RecipeError("prompts: {} stands for forget.concept, which this run does not have; write the prompts out")
    rows = [(text, at) for at, old in enumerate(file.texts) for text in filled(old, names)]
    if wrong := next((text for text, _ in rows if "{}" in text), None):
        raise RecipeError(f"prompts: {{}} must stand as a word of its own in {wrong[:80]!r}")
    order = [at for _, at in rows]
    return PromptFile(
        tuple(text for text, _ in rows),
        tuple(file.seeds[at] for at in order) if file.seeds else file.seeds,
        tuple(file.categories[at] for at in order) if file.categories else file.categories,
    )


def numbered_prompts(path: str | Path) -> tuple[PromptFile, list[int]]:
    """What `read_prompts` returns, perhaps nothing, and the line of each prompt. Raises DataError."""
    path = Path(path)
    try:
        text = read_text(path)
    except DataError as error:
        cause = error.__context__  # the decoder's own error still holds the bytes, and with them the line
        if not isinstance(cause, UnicodeDecodeError):
            raise
        line = cause.object.count(b"\n", 0, cause.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    found, lines = _table(path, text) if path.suffix.lower() in SUFFIXES[1:] else _list(text)
    for prompt, line in zip(found.texts, lines):
        if bad := odd_character(prompt):
            raise DataError(f"{path}, line {line}: holds the character {bad!r}, which is no text")
    return found, lines


def clean(text: str) -> str:
    """Unicode in its composed form, white space as single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def odd_character(text: str) -> str | None:
    """The first character that is no text: a control character, half of a pair."""
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)


def _list(text: str) -> tuple[PromptFile, list[int]]:
    rows = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
    kept = [(at, row) for at, row in rows if row.strip() and not row.lstrip().startswith("#")]
    return PromptFile(tuple(clean(row) for _, row in kept)), [at for at, _ in kept]


def _table(path: Path, text: str) -> tuple[PromptFile, list[int]]:
    texts: list[str] = []
    lines: list[int] = []
    seeds: list[int] = []
    categories: list[tuple[str, ...]] = []
    rows = _rows(path, text)
    _, header = next(rows)
    column = next((name for name in PROMPT_COLUMNS if name in header), None)
    if column is None:
        names = ", ".join(name[:40] for name in header if name)[:200] or "none"
        raise DataError(f"{path}, line 1: no column named prompt, caption or text; the columns are {names}")
    seed_column = next((name for name in SEED_COLUMNS if name in header), None)
    for line, cells in rows:
        where = f"{path}, line {line}"
        if len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} cells under {len(header)} columns; is a comma not quoted?")
        row = dict(zip(header, cells))
        texts.append(clean(row[column]))
        lines.append(line)
        if not texts[-1]:
            raise DataError(f"{where}: the prompt is empty; fill it in or remove the row")
        if seed_column is not None:
            seeds.append(_seed(where, seed_column, row[seed_column].strip()))
        if "categories" in row:
            names_of = (name.strip() for name in row["categories"].split(","))
            categories.append(tuple(name for name in names_of if name))
    found = PromptFile(
        tuple(texts),
        tuple(seeds) if seed_column is not None else None,
        tuple(categories) if "categories" in header else None,
    )
    return found, lines


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the header, in lower case, then of each row that is not empty."""
    first = text.split("\n", 1)[0]
    counts = {mark: first.count(mark) for mark in ",;\t"}
    mark = "\t" if path.suffix.lower() == ".tsv" else max(counts, key=counts.__getitem__)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        yield 1, [name.strip().lower() for name in next(reader, [])]
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a {path.suffix[1:].upper()} file: {error}") from None


def _seed(where: str, column: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) <= 19 and int(cell) < 1 << 63):
        raise DataError(f"{where}: {column} {cell[:40]!r} is no whole number from 0 to 2^63 - 1")
    return int(cell)
