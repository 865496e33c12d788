"""gtflops: what a training step costs, exactly; which tensors are worth training under a budget; train them."""

from typing import TYPE_CHECKING

from gtflops.lazy_names import loading

if TYPE_CHECKING:
    from gtflops.capture.dispatch import ExecutedFlops
    from gtflops.capture.uses import tie
    from gtflops.curve import Frontier, frontier
    from gtflops.errors import (
        BudgetSpentError,
        GtflopsError,
        InfeasibleBudgetError,
        InputError,
        ProcessesError,
        SavedFileError,
        UnsupportedModelError,
        UnsupportedOperatorError,
    )
    from gtflops.importance import ImportanceCheck, check_importance, expected_drop, measure_importance
    from gtflops.operators import register_flops
    from gtflops.profiling import Profile, ReusedStep, StepFlops, TensorCost, profile
    from gtflops.selection import Selection, select
    from gtflops.solver import KnapsackResult, knapsack
    from gtflops.spending import OperatingPoint, operating_point
    from gtflops.timing import measure_time
    from gtflops.training import GreenTrainer

# Where each public name lives. They are loaded when first used: the solver and a saved profile need no torch.
_HOME = {
    "BudgetSpentError": "errors",
    "ExecutedFlops": "capture.dispatch",
    "Frontier": "curve",
    "GreenTrainer": "training",
    "GtflopsError": "errors",
    "ImportanceCheck": "importance",
    "InfeasibleBudgetError": "errors",
    "InputError": "errors",
    "KnapsackResult": "solver",
    "OperatingPoint": "spending",
    "ProcessesError": "errors",
    "Profile": "profiling",
    "ReusedStep": "profiling",
    "SavedFileError": "errors",
    "Selection": "selection",
    "StepFlops": "profiling",
    "TensorCost": "profiling",
    "UnsupportedModelError": "errors",
    "UnsupportedOperatorError": "errors",
    "check_importance": "importance",
    "expected_drop": "importance",
    "frontier": "curve",
    "knapsack": "solver",
    "measure_importance": "importance",
    "measure_time": "timing",
    "operating_point": "spending",
    "profile": "profiling",
    "register_flops": "operators",
    "select": "selection",
    "tie": "capture.uses",
}

__all__ = [
    "BudgetSpentError",
    "ExecutedFlops",
    "Frontier",
    "GreenTrainer",
    "GtflopsError",
    "ImportanceCheck",
    "InfeasibleBudgetError",
    "InputError",
    "KnapsackResult",
    "OperatingPoint",
    "ProcessesError",
    "Profile",
    "ReusedStep",
    "SavedFileError",
    "Selection",
    "StepFlops",
    "TensorCost",
    "UnsupportedModelError",
    "UnsupportedOperatorError",
    "check_importance",
    "expected_drop",
    "frontier",
    "knapsack",
    "measure_importance",
    "measure_time",
    "operating_point",
    "profile",
    "register_flops",
    "select",
    "tie",
]


__getattr__ = loading(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
