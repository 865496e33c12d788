"""Several schemes on the same model and data, from the same weights and seeds."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gtflops.errors import GtflopsError, InputError
from gtflops.recipes.datasets import DataSet
from gtflops.recipes.finetune import FineTuneResult, FineTuneSettings, finetune
from gtflops.recipes.models import Pretrained
from gtflops.recipes.schemes import scheme
from gtflops.training import EnergyMeter, StepRecord, budget_of
from gtflops.training.budgets import BudgetLike


@dataclass(frozen=True)
class Comparison:
    """The runs by scheme, in the order asked for, with the settings of each; ``failed`` ones with what went wrong."""

    data: str
    settings: Mapping[str, FineTuneSettings]
    runs: Mapping[str, FineTuneResult]
    failed: Mapping[str, str]


def compare(
    pretrained: Pretrained,
    data: DataSet,
    schemes: Sequence[str],
    settings: FineTuneSettings,
    *,
    learning_rates: Mapping[str, float] | None = None,
    energy: Callable[[], EnergyMeter] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Comparison:
    """Fine-tune a copy of the model by each scheme, in turn.

    A scheme is a name, or ``greentrainer@0.7`` for another budget than the settings', or ``greentrainer@auto``.
    ``learning_rates`` of some, by the same names, take the place of the settings': adapters want higher ones.
    ``energy`` makes a meter for each run. Each run starts from the same weights, sees the same batches in the same
    order and draws the same random numbers. What can be told before the first run is refused then (InputError): a
    scheme that does not fit the model, a budget that does not fit the length. A run that fails later leaves the others
    as they are.
    """
    runs_to_make = {label: _settings(label, settings, learning_rates or {}) for label in schemes}
    if len(runs_to_make) != len(schemes) or not schemes:
        raise InputError(f"schemes are {', '.join(schemes) or 'none'}; expected at least one, each once")
    if strangers := sorted((learning_rates or {}).keys() - runs_to_make.keys()):
        raise InputError(f"a learning rate is given for {strangers[0]!r}, expected one of {', '.join(runs_to_make)}")
    for one in runs_to_make.values():
        with torch.device("meta"):
            skeleton = type(pretrained.model)(pretrained.model.config)
        scheme(one.scheme).prepare(skeleton)
        if scheme(one.scheme).budgeted:
            budget_of(one.budget).check(one.steps, one.num_epochs(len(data.train)))

    runs: dict[str, FineTuneResult] = {}
    failed: dict[str, str] = {}
    for label, one in runs_to_make.items():
        on_progress(label, 0, one.steps if one.until is None else 100)
        try:
            runs[label] = finetune(
                copy.deepcopy(pretrained.model),
                pretrained.tokenizer,
                data,
                one,
                profile=next((run.base for run in runs.values()), None),
                energy=None if energy is None else energy(),
                on_step=_reporting(on_progress, label, one),
            )
        except GtflopsError as error:
            failed[label] = str(error)
    return Comparison(data.name, runs_to_make, runs, failed)


def _settings(label: str, settings: FineTuneSettings, learning_rates: Mapping[str, float]) -> FineTuneSettings:
    name, at, budget = label.partition("@")
    if at and not scheme(name).budgeted:
        raise InputError(f"{label!r} has a budget, but {name} takes none; expected as in greentrainer@0.7")
    share: BudgetLike = settings.budget
    if at:
        try:
            share = "auto" if budget == "auto" else float(budget)
        except ValueError as error:
            raise InputError(
                f"the budget in {label!r} is no number; expected as in greentrainer@0.7, or greentrainer@auto"
            ) from error
    rate = learning_rates.get(label, settings.learning_rate)
    return replace(settings, scheme=name, budget=share, learning_rate=rate)


def _reporting(
    on_progress: Callable[[str, int, int], None], label: str, settings: FineTuneSettings
) -> Callable[[StepRecord], None]:
    """In steps, or in percent of the FLOPs that end the run."""
    if settings.until is None:
        return lambda record: on_progress(label, record.step + 1, settings.steps)
    until, spent = settings.until, 0

    def report(record: StepRecord) -> None:
        nonlocal spent
        spent += record.planned_flops
        on_progress(label, int(100 * spent / until), 100)

    return report
