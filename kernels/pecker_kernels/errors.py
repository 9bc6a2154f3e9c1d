"""Errors a caller can cause; all of them are ValueErrors, so code written for torch.optim catches them."""

from __future__ import annotations


class PeckerKernelsError(ValueError):
    """Base of every error this package raises on purpose."""


class MaskError(PeckerKernelsError):
    """A mask does not fit the tensors it is used on, or a mask file is damaged."""


class ScoreError(PeckerKernelsError):
    """Saliency scores are negative, not finite, or were never accumulated."""


class NativeLibraryError(PeckerKernelsError):
    """The compiled CPU library is absent, of another version, or cannot serve the request."""
