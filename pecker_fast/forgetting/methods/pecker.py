"""PECKER (arXiv 2604.05634): SFD whose forget updates touch the salient weights only."""

from pecker_fast.forgetting.objective import ScoreDistillation


class Pecker(ScoreDistillation):
    """The update rule of the recipe under the saliency mask; without a mask (`mask.source=none`) it is SFD."""
