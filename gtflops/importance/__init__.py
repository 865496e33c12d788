"""Importance of each tensor: the first-order estimate of the drop in loss that training it would bring."""

from gtflops.importance.checking import ImportanceCheck, check_importance, expected_drop
from gtflops.importance.learning_rates import coming_rates
from gtflops.importance.measuring import Method, measure_importance
from gtflops.importance.updates import UpdateName

__all__ = [
    "ImportanceCheck",
    "Method",
    "UpdateName",
    "check_importance",
    "coming_rates",
    "expected_drop",
    "measure_importance",
]
