"""Below the forward floor: what a frozen prefix computes for an example is stored, and not computed again."""

from gtflops.reuse.prefix import PlannedPass, Prefix, ReuseStatistics
from gtflops.reuse.store import ActivationStore, Key

__all__ = ["ActivationStore", "Key", "PlannedPass", "Prefix", "ReuseStatistics"]
