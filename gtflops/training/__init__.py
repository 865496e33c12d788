"""Training under a budget: the loop, budgets that move, checkpoints, energy, and watching; needs torch."""

from gtflops.training.budgets import Auto, Budget, CarbonAware, Progress, Total, budget_of, total_of
from gtflops.training.energy import Energy, EnergyMeter
from gtflops.training.intensity import IntensitySeries, read_intensity
from gtflops.training.loop import GreenTrainer
from gtflops.training.records import SelectionRecord, StepRecord, TrainingLog
from gtflops.training.watching import JsonLines, ProgressBar, TensorBoard, Watcher, read_log

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
