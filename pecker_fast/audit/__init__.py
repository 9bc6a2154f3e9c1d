"""Hidden or forgotten: what comes back under attack, read against a model that only hides and models that never knew."""

from pecker_fast.audit.audit import Audit
from pecker_fast.audit.budget import BUDGETS, Budget, budget_of
from pecker_fast.audit.probes import PROBES
from pecker_fast.audit.progress import AuditTicker
from pecker_fast.audit.record import AUDIT, AUDIT_IMAGES, read_audit
from pecker_fast.audit.said import said_otherwise
from pecker_fast.audit.scene import Finding, Scene
from pecker_fast.audit.subjects import BEFORE, NEVER, RELABEL, RESULT, Subject, relabelled
from pecker_fast.audit.worlds import ClassWorld, TextWorld, World, text_world

__all__ = [
    "AUDIT",
    "AUDIT_IMAGES",
    "BEFORE",
    "BUDGETS",
    "NEVER",
    "PROBES",
    "RELABEL",
    "RESULT",
    "Audit",
    "AuditTicker",
    "Budget",
    "ClassWorld",
    "Finding",
    "Scene",
    "Subject",
    "TextWorld",
    "World",
    "budget_of",
    "read_audit",
    "relabelled",
    "said_otherwise",
    "text_world",
]
