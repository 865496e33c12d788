"""Below the forward floor: what a frozen prefix computes for an example is stored, and not computed again."""

from gtflops.reuse.prefix import Prefix, ReuseStatistics
from gtflops.reuse.store import ActivationStore, Key

__all__ = ["ActivationStore", "Key", "Prefix", "ReuseStatistics"]
