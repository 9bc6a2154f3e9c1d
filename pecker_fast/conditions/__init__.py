"""What to forget, what to draw in its place, what to keep: classes and prompts."""

from pecker_fast.conditions.classes import SHOWN, Conditions, class_conditions, short_range, shown_classes
from pecker_fast.conditions.forms import plural as plural_of
from pecker_fast.conditions.inlined import inlined, inlined_captions
from pecker_fast.conditions.notes import notes_of
from pecker_fast.conditions.prompt_file import clean, placed, read_prompts
from pecker_fast.conditions.prompts import PromptPlan, concept_names, plan_prompts
from pecker_fast.conditions.words import Names, put

__all__ = [
    "SHOWN",
    "Conditions",
    "Names",
    "PromptPlan",
    "class_conditions",
    "clean",
    "concept_names",
    "inlined",
    "inlined_captions",
    "notes_of",
    "placed",
    "plan_prompts",
    "plural_of",
    "put",
    "read_prompts",
    "short_range",
    "shown_classes",
]
