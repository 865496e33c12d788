"""What can go wrong, by what the user can do about it."""


class GtflopsError(Exception):
    """Base class of every error that gtflops raises on purpose."""


class InputError(GtflopsError, ValueError):
    """An argument is not what was expected; the message says what would be."""


class UnsupportedModelError(GtflopsError):
    """The model cannot be captured, for example because its control flow depends on data."""


class UnsupportedOperatorError(GtflopsError):
    """An operator of the model has no price, so its cost would be a guess."""


class InfeasibleBudgetError(GtflopsError):
    """No selection fits the budget; the message names the smallest budget that one fits."""


class BudgetSpentError(GtflopsError):
    """What a whole run may spend does not pay for the coming step; end the loop. The weights are as they were."""


class SavedFileError(GtflopsError):
    """A saved file is damaged, or was written by another version of its format."""


class ProcessesError(GtflopsError):
    """Processes that train one model together are not alike, or another one of them failed; the message says which."""
