"""The command line, one short file a verb or a few."""

from pecker_fast.cli.entry import app, main

__all__ = ["app", "main"]
