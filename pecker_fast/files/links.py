"""Entries of a model folder: that they stay inside it, and that nothing but files, folders and links to them lies there."""

from __future__ import annotations

import stat
from pathlib import Path

from pecker_fast.errors import ModelError
from pecker_fast.files.reading import reason_of


def check_entry(entry: Path, home: Path) -> None:
    """Raises ModelError for a link out of `home`, in a circle or to nothing, and for pipes and devices, which would be
    waited for."""
    try:
        target = entry.resolve()
        if not target.is_relative_to(home):
            raise ModelError(f"{entry}: a link that leaves the model folder; copy the file in its place")
        mode = target.stat().st_mode
    except (OSError, ValueError, RuntimeError) as reason:  # RuntimeError: a circle, before Python 3.13
        why = "a link to itself" if isinstance(reason, RuntimeError) else reason_of(reason)
        raise ModelError(f"{entry}: leads nowhere ({why}); put the file in its place, or remove it") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(f"{entry}: neither a file nor a folder; nothing else is read in a model folder")
