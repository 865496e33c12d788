"""Training under a budget: the loop, budgets that move, checkpoints, energy, and watching."""

from typing import TYPE_CHECKING

from gtflops.lazy_names import loading

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


__getattr__ = loading(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
