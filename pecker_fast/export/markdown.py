"""Foreign text in a Markdown page: names, prompts and paths stay text, whatever is in them."""

from __future__ import annotations

import re

_MEANT = re.compile(
    r"[\\`*_\[\]<>#|~$&@]|:(?=//)|(?<=[Ww]{3})\."
)  # marks, tags, entities, and what makes a link by itself
_RUN = re.compile(r"`+")


def plain(text: str) -> str:
    """One line of text that reads as it is: no mark-up, no HTML, no link."""
    return _MEANT.sub(lambda found: "\\" + found[0], one_line(text))


def code(text: str) -> str:
    """One line of text as a code span, which nothing in it ends."""
    text = one_line(text)
    fence = "`" * (_longest(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def block(text: str, language: str) -> str:
    """Lines of code in a block, which nothing in them ends."""
    fence = "`" * max(3, _longest(text) + 1)
    lines = text.rstrip("\n").split("\n")
    return "\n".join([f"{fence}{language}", *map(_printable, lines), fence])


def one_line(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """What would steer a terminal or turn the text round is escaped, as in messages."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def _longest(text: str) -> int:
    return max(map(len, _RUN.findall(text)), default=0)
