"""The thin training loop; needs torch."""

from gtflops.training.loop import GreenTrainer, SelectionRecord, StepRecord, TrainingLog

__all__ = ["GreenTrainer", "SelectionRecord", "StepRecord", "TrainingLog"]
