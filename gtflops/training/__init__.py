"""Training under a budget: the loop, budgets that move, checkpoints, energy, and watching."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtflops.training.budgets import Auto, Budget, CarbonAware, Progress, Total, budget_of, total_of
    from gtflops.training.energy import Energy, EnergyMeter
    from gtflops.training.intensity import IntensitySeries, read_intensity
    from gtflops.training.loop import GreenTrainer
    from gtflops.training.records import SelectionRecord, StepRecord, TrainingLog
    from gtflops.training.watching import JsonLines, ProgressBar, TensorBoard, Watcher, read_log

# Where each name lives. They are loaded when first used: a log is read and reported without torch.
_HOME = {
    "Auto": "budgets",
    "Budget": "budgets",
    "CarbonAware": "budgets",
    "Energy": "energy",
    "EnergyMeter": "energy",
    "GreenTrainer": "loop",
    "IntensitySeries": "intensity",
    "JsonLines": "watching",
    "Progress": "budgets",
    "ProgressBar": "watching",
    "SelectionRecord": "records",
    "StepRecord": "records",
    "TensorBoard": "watching",
    "Total": "budgets",
    "TrainingLog": "records",
    "Watcher": "watching",
    "budget_of": "budgets",
    "read_intensity": "intensity",
    "read_log": "watching",
    "total_of": "budgets",
}

__all__ = [
    "Auto",
    "Budget",
    "CarbonAware",
    "Energy",
    "EnergyMeter",
    "GreenTrainer",
    "IntensitySeries",
    "JsonLines",
    "Progress",
    "ProgressBar",
    "SelectionRecord",
    "StepRecord",
    "TensorBoard",
    "Total",
    "TrainingLog",
    "Watcher",
    "budget_of",
    "read_intensity",
    "read_log",
    "total_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gtflops.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gtflops.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
