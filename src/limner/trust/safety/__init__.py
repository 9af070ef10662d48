"""What is refused: checks of prompts, references and results behind one small protocol.

No check here replaces a person: a classifier and a list of terms miss things, and refuse things that are fine.
"""

from limner.trust.safety.check import DEFAULT_TOLERANCE, MAX_TOLERANCE, Finding, Role, SafetyCheck, check_tolerance
from limner.trust.safety.checks import Checks, default_checks, no_checks
from limner.trust.safety.pictures import NSFW_THRESHOLDS, NsfwImageCheck
from limner.trust.safety.prompts import PromptCheck

__all__ = [
    "DEFAULT_TOLERANCE",
    "MAX_TOLERANCE",
    "NSFW_THRESHOLDS",
    "Checks",
    "Finding",
    "NsfwImageCheck",
    "PromptCheck",
    "Role",
    "SafetyCheck",
    "check_tolerance",
    "default_checks",
    "no_checks",
]
