"""Training under a budget: the loop, what it writes down, and its checkpoints; needs torch."""

from gtflops.training.loop import GreenTrainer
from gtflops.training.records import SelectionRecord, StepRecord, TrainingLog

__all__ = ["GreenTrainer", "SelectionRecord", "StepRecord", "TrainingLog"]
