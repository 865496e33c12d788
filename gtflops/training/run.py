"""The batches of a run, step by step, from any step on; its checkpoints, and its end by Ctrl-C."""

import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtflops.errors import InputError
from gtflops.training import checkpoints

if TYPE_CHECKING:
    from gtflops.training.loop import GreenTrainer


class Run:
    """The batches of a run, step by step, from any step on; and the checkpoints that it goes on from."""

    def __init__(
        self,
        trainer: "GreenTrainer",
        batches: Iterable[Any],
        epochs: int,
        num_steps: int | None,
        accumulate: int,
        measure_on: int,
        folder: Path | None,
    ) -> None:
        numbers = {"epochs": epochs, "accumulate": accumulate, "measure_on": measure_on}
        for name, value in (numbers if num_steps is None else {**numbers, "num_steps": num_steps}).items():
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}, expected a positive integer")
        if epochs > 1 and isinstance(batches, Iterator):
            raise InputError(
                f"an iterator of batches is gone after one epoch; expected a list or a loader for {epochs}"
            )
        self._trainer = trainer
        self._batches = batches
        self._epochs = epochs
        self._most_steps = num_steps
        self._accumulate = accumulate
        self._ahead = max(accumulate, measure_on)
        self._measure_on = measure_on
        self._folder = folder
        self._first_step = len(trainer.log.steps)
        self._epoch = 0
        self.steps_in_epoch = 0
        self._at_start_of_epoch: Mapping[str, Any] | None = None
        self._after_skipping: Mapping[str, Any] | None = None

    @property
    def num_steps(self) -> int | None:
        """Steps until the end of the run, those of runs before it included; ``None`` for batches without a length, and
        no number given."""
        steps = self._most_steps
        if self._steps_in_epoch is not None:
            in_all = self._steps_in_epoch * self._epochs
            steps = in_all if steps is None else min(steps, in_all)
        return None if steps is None else self._first_step + steps

    @property
    def whole_epochs(self) -> int | None:
        """How many passes over all batches the run makes; ``None`` for batches without a length."""
        if self._steps_in_epoch is None:
            return None
        if self._most_steps is None or not self._steps_in_epoch:
            return self._epochs
        return min(self._epochs, self._most_steps // self._steps_in_epoch)

    @property
    def _steps_in_epoch(self) -> int | None:
        try:
            return len(self._batches) // self._accumulate  # type: ignore[arg-type]
        except TypeError:  # a loader of a data set without a length has __len__ too
            return None

    def __iter__(self) -> Iterator[tuple[int, tuple[Any, ...], list[Any]]]:
        """Epoch, batches of a step, and batches to measure importance on if that is due."""
        for epoch in range(self._epoch, self._epochs):
            self._epoch = epoch
            if self._at_start_of_epoch is None:
                self._at_start_of_epoch = checkpoints.random_states()
            if callable(set_epoch := getattr(self._batches, "set_epoch", None)):
                set_epoch(epoch)
            stream = iter(self._batches)
            for _ in islice(stream, self.steps_in_epoch * self._accumulate):
                pass
            if self._after_skipping is not None:
                checkpoints.restore_random_states(self._after_skipping)
                self._after_skipping = None
            stream = map(self._trainer.trimmed, stream)
            ahead: deque[Any] = deque(islice(stream, self._ahead))
            while self._trainer.processes.all("another step", len(ahead) >= self._accumulate):
                made = len(self._trainer.log.steps) - self._first_step
                if self._most_steps is not None and made >= self._most_steps:
                    return
                step = tuple(islice(ahead, self._accumulate))
                yield epoch, step, list(islice(ahead, self._measure_on))
                for _ in step:
                    ahead.popleft()
                ahead.extend(islice(stream, self._accumulate))
            self._epoch, self.steps_in_epoch, self._at_start_of_epoch = epoch + 1, 0, None

    def save(self) -> None:
        """One checkpoint for all processes, that of a run in one process, but for a random state of each."""
        assert self._folder is not None
        trainer, processes = self._trainer, self._trainer.processes
        with processes.together():
            whole_model = processes.whole_model()
            states = {
                "optimizer": processes.whole(trainer.optimizer.state_dict()),
                "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
                "random": processes.gathered("a checkpoint", checkpoints.random_states()),
                "random_at_start_of_epoch": processes.gathered("a checkpoint", self._at_start_of_epoch),
            }
            progress = {
                "trainer": trainer.state_dict(),
                "epoch": self._epoch,
                "steps_in_epoch": self.steps_in_epoch,
                "first_step": self._first_step,
                "accumulate": self._accumulate,
                "processes": processes.count,
            }
            steps, folder = len(trainer.log.steps), self._folder
            processes.first("the checkpoint", lambda: checkpoints.write(folder, steps, whole_model, states, progress))

    def _require_own(self, path: Path, states: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """InputError for a checkpoint of a run that was built in another way."""
        trainer = self._trainer
        for name, here in (("accumulate", self._accumulate), ("processes", trainer.processes.count)):
            if progress[name] != here:
                raise InputError(f"{path} is of a run with {name}={progress[name]}, expected the same, not {here}")
        if (trainer.scheduler is None) != (states["scheduler"] is None):
            raise InputError(
                f"{path} is of a run with{'out' if states['scheduler'] is None else ''} a scheduler, expected the same"
            )
        trainer.require_candidates_of(progress["trainer"])

    def require_room(self) -> None:
        """For a run that is not resumed: InputError for a folder of another one, SavedFileError where there is none."""
        if self._folder is not None:
            steps, folder = self._first_step, self._folder
            self._trainer.processes.first("the checkpoints", lambda: checkpoints.require_room(folder, steps))

    def resume(self) -> None:
        assert self._folder is not None
        trainer, processes = self._trainer, self._trainer.processes
        with processes.together():
            whole_model = processes.whole_model()
            checkpoint = checkpoints.read_last(self._folder, whole_model, self._require_own)
            states, progress = checkpoint.states, checkpoint.progress
            processes.require_same("the checkpoint to resume from", str(checkpoint.path))
            processes.take_weights(whole_model)
            trainer.load_state_dict(progress["trainer"])
            trainer.optimizer.load_state_dict(processes.sharded_state(trainer.optimizer, states["optimizer"]))
        if trainer.scheduler is not None:
            trainer.scheduler.load_state_dict(states["scheduler"])
        self._first_step = progress["first_step"]
        trainer.num_steps = trainer.num_steps if self.num_steps is None else self.num_steps
        self._epoch, self.steps_in_epoch = progress["epoch"], progress["steps_in_epoch"]
        random, self._at_start_of_epoch = (
            states[name][processes.rank] for name in ("random", "random_at_start_of_epoch")
        )
        if self._at_start_of_epoch is None:
            checkpoints.restore_random_states(random)
        else:  # a loader shuffles again as it did
            checkpoints.restore_random_states(self._at_start_of_epoch)
            self._after_skipping = random


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, in the place of an end in the middle of a step; a second one ends it."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread only
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
