"""What to forget, what to draw in its place, what to keep: classes and prompts."""

from pecker_fast.conditions.classes import Conditions, class_conditions
from pecker_fast.conditions.prompts import PromptPlan, plan_prompts

__all__ = ["Conditions", "PromptPlan", "class_conditions", "plan_prompts"]
