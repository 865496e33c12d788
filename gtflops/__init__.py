"""gtflops: what a training step costs, exactly; which tensors are worth training under a budget; train them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtflops.capture.dispatch import ExecutedFlops
    from gtflops.curve import Frontier, frontier
    from gtflops.errors import (
        GtflopsError,
        InfeasibleBudgetError,
        InputError,
        ProcessesError,
        SavedFileError,
        UnsupportedModelError,
        UnsupportedOperatorError,
    )
    from gtflops.importance import measure_importance
    from gtflops.operators import register_flops
    from gtflops.profiling import Profile, StepFlops, TensorCost, profile
    from gtflops.selection import Selection, select
    from gtflops.solver import KnapsackResult, knapsack
    from gtflops.timing import measure_time
    from gtflops.training import GreenTrainer

# Where each public name lives. They are loaded when first used: the solver and a saved profile need no torch.
_HOME = {
    "ExecutedFlops": "capture.dispatch",
    "Frontier": "curve",
    "GreenTrainer": "training",
    "GtflopsError": "errors",
    "InfeasibleBudgetError": "errors",
    "InputError": "errors",
    "KnapsackResult": "solver",
    "ProcessesError": "errors",
    "Profile": "profiling",
    "SavedFileError": "errors",
    "Selection": "selection",
    "StepFlops": "profiling",
    "TensorCost": "profiling",
    "UnsupportedModelError": "errors",
    "UnsupportedOperatorError": "errors",
    "frontier": "curve",
    "knapsack": "solver",
    "measure_importance": "importance",
    "measure_time": "timing",
    "profile": "profiling",
    "register_flops": "operators",
    "select": "selection",
}

__all__ = [
    "ExecutedFlops",
    "Frontier",
    "GreenTrainer",
    "GtflopsError",
    "InfeasibleBudgetError",
    "InputError",
    "KnapsackResult",
    "ProcessesError",
    "Profile",
    "SavedFileError",
    "Selection",
    "StepFlops",
    "TensorCost",
    "UnsupportedModelError",
    "UnsupportedOperatorError",
    "frontier",
    "knapsack",
    "measure_importance",
    "measure_time",
    "profile",
    "register_flops",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gtflops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gtflops.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
