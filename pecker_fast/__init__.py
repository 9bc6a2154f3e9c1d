"""Remove a class from a diffusion model: score forgetting distillation with saliency masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "unlearn"]

if TYPE_CHECKING:
    from pecker_fast.runs import unlearn


def __getattr__(name: str) -> Any:
    # torch and diffusers are imported when they are first needed, so that `pecker-fast --help` stays quick
    if name == "unlearn":
        from pecker_fast.runs import unlearn

        return unlearn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
