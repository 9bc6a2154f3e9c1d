"""Files that grow by a line at a time: a line is whole or absent, and what a kill has torn is cut off."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from io import FileIO
from pathlib import Path

from pecker_fast.files import writing


class LineFile:
    """A file of JSON lines that is made, or continued: a last line torn by a kill is cut off first. Raises OutputError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing.output_errors(path):
            writing.make_folder(path.parent)
            writing.disk_step(f"write:{path.name}")
            self._file: FileIO = path.open("r+b" if path.exists() else "w+b", buffering=0)
            try:
                _cut_torn_line(self._file)
            except BaseException:
                self._file.close()
                raise

    def append(self, line: str) -> None:
        """The line and its end, or nothing of it; raises OSError."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        end = self._file.tell()
        try:
            writing.disk_step(f"write:{self.path.name}")
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._file.seek(end)
            raise

    def settle(self) -> None:
        """Make the lines durable; raises OSError."""
        writing.fsync_fd(self._file.fileno(), self.path.name)

    def close(self) -> None:
        """Raises OSError where the disk tells only now that it is full."""
        self._file.close()


def append_line(path: str | Path, line: str) -> None:
    """Add one line to a file of lines, whole or not at all; raises OutputError."""
    path = Path(path)
    file = LineFile(path)
    with writing.output_errors(path):
        try:
            file.append(line)
            file.settle()
        finally:
            file.close()


def _cut_torn_line(file: FileIO) -> None:
    """Leave `file` at its end, which is the end of a whole line."""
    data = file.read()
    end = len(data)
    if data and not data.endswith(b"\n"):
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        try:
            json.loads(tail)
        except ValueError:
            file.truncate(end)
        else:  # whole but for its line break
            end = len(data)
            file.seek(end)
            file.write(b"\n")
            return
    file.seek(end)
