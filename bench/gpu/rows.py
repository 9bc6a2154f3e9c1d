"""What is known is on disk at once: a line of results.jsonl each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


def put(folder: Path, **row: Any) -> None:
    """Append one row, and wait until it is on the disk."""
    line = json.dumps(row)
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line, flush=True)


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows; a last line that was cut off is left out."""
    found = []
    for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
