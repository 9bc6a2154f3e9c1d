"""What to forget, what to draw in its place, what to keep: classes and prompts."""

from pecker_fast.conditions.classes import SHOWN, Conditions, class_conditions, short_range, shown_classes
from pecker_fast.conditions.inlined import inlined, inlined_captions
from pecker_fast.conditions.prompts import PromptPlan, plan_prompts

__all__ = [
    "SHOWN",
    "Conditions",
    "PromptPlan",
    "class_conditions",
    "inlined",
    "inlined_captions",
    "plan_prompts",
    "short_range",
    "shown_classes",
]
