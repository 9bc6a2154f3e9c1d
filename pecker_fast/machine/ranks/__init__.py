"""The processes of one run: who is first, and how all of them start, fail and stop together."""

from pecker_fast.machine.ranks.group import Group, joined, launched
from pecker_fast.machine.ranks.ranks import ALONE, Ranks, launched_world

__all__ = ["ALONE", "Group", "Ranks", "joined", "launched", "launched_world"]
