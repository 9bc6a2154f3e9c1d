"""Libraries that keep to themselves what they think of a foreign config: what matters of it is refused, or told by us."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Inside, diffusers says nothing of keys it does not know, which may be anybody's text, nor of what it cuts off prompts."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """`quiet_diffusers`, and transformers says nothing of what it loads, and of what it could load if more were installed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_diffusers():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
